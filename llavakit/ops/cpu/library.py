"""Compiling the kernels on the machine that runs them, once, and calling them.

Owns: load_kernels and Kernels. Without a C compiler there are none, and the references in torch run.
The library lies in the user's cache under a name that tells source, flags, compiler and processor apart, so that a home shared by
unlike machines works. OpenMP's threads are torch's: its libgomp is in the process already and has the name that the library asks for.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llavakit.logs import logger

__all__ = ["Kernels", "load_kernels"]

_LOG = logger("ops")
_FOLDER = Path(__file__).parent
_SOURCES, _HEADERS = ("paged_attention.c", "matmul.c", "gate.c"), ("lanes.h",)
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast")
_CACHE = Path(".cache") / "llavakit"
_TIMEOUT_S = 120


class Attention(ctypes.Structure):
    """The arguments of one call, as the C file has them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "o", "positions", "starts", "tables", "keys", "values")),
        *((name, ctypes.c_int32) for name in ("num_sequences", "table_width", "num_heads", "num_kv_heads", "head_dim", "width", "window")),
        ("scale", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
    )


class Product(ctypes.Structure):
    """The arguments of a product, as the C file has them."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("num_rows", "num_outputs", "num_steps")),
        ("num_threads", ctypes.c_int32),
    )


class Kernels:
    """The compiled functions; tensors must be contiguous, on the CPU, and of the dtypes that the C file names."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend, self._append = library.attend, {4: library.append_float, 2: library.append_half}
        pointers, numbers = [ctypes.c_void_p] * 3, [ctypes.c_int32] * 4
        self._gate = library.gate
        self._gate.argtypes, self._gate.restype = [*pointers, ctypes.c_int64, ctypes.c_int32, ctypes.c_int32], None
        self._attend.argtypes, self._attend.restype = [ctypes.c_void_p, ctypes.c_int32], None
        self._matmul = library.matmul
        self._matmul.argtypes, self._matmul.restype = [ctypes.c_void_p, ctypes.c_int32], None
        for append in self._append.values():
            append.argtypes, append.restype = [*pointers, *numbers, ctypes.c_void_p, ctypes.c_void_p], None

    def append(self, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put new keys and values into their slots (int64, page * PAGE + place)."""
        num_tokens, num_heads, head_dim = k_TKH.shape
        pointers = k_TKH.data_ptr(), v_TKH.data_ptr(), slots_T.data_ptr()
        self._append[keys.itemsize](*pointers, num_tokens, num_heads, head_dim, keys.shape[2], keys.data_ptr(), values.data_ptr())

    def attend(self, arguments: Attention, *, is_half: bool) -> None:
        """Fill the output rows."""
        self._attend(ctypes.byref(arguments), is_half)

    def matmul(self, x_MI: Tensor, panels: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
        """Multiply by a weight in panels [P, steps, 64 (, 2)] of the same dtype: y [M, num_outputs]."""
        x_MI = x_MI.contiguous()
        y_MO = x_MI.new_empty(x_MI.shape[0], num_outputs)
        product = Product(
            x=x_MI.data_ptr(),
            w=panels.data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            y=y_MO.data_ptr(),
            num_rows=x_MI.shape[0],
            num_outputs=num_outputs,
            num_steps=panels.shape[1],
            num_threads=torch.get_num_threads(),
        )
        self._matmul(ctypes.byref(product), x_MI.dtype == torch.bfloat16)
        return y_MO

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up, float32 or bfloat16."""
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        is_half = gate.dtype == torch.bfloat16
        self._gate(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel(), torch.get_num_threads(), is_half)
        return out


@functools.cache
def load_kernels() -> Kernels | None:
    """Compile the kernels where that has not happened yet, and load them; None, said once, where there is no working compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        _LOG.warning("there is no C compiler, so attention runs in torch, which is slower; install gcc or clang")
        return None
    try:
        return Kernels(_library(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        reason = error.stderr.decode(errors="replace").strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        _LOG.warning("the kernels could not be compiled or loaded, so attention runs in torch, which is slower: %s", reason[-500:])
        return None


def _library(compiler: str) -> ctypes.CDLL:
    """Load the library from the cache, or compile it first. Raises: OSError, SubprocessError."""
    cache = _writable_cache()
    if cache is not None:
        return ctypes.CDLL(str(_compiled(compiler, cache)))
    with tempfile.TemporaryDirectory() as folder:  # what is loaded needs its file no longer
        return ctypes.CDLL(str(_compiled(compiler, Path(folder))))


def _compiled(compiler: str, folder: Path) -> Path:
    """Return the library's path in a folder, where it is compiled if it is missing."""
    source = b"".join((_FOLDER / name).read_bytes() for name in (*_SOURCES, *_HEADERS))
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=_TIMEOUT_S).stdout
    name = hashlib.sha256(b"\0".join((source, " ".join(_FLAGS).encode(), version, _processor(), torch.__version__.encode()))).hexdigest()
    library = folder / f"kernels-{name[:32]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "kernels.so"
            command = [compiler, *_FLAGS, *(str(_FOLDER / name) for name in _SOURCES), "-o", str(built), "-lm"]
            try:
                subprocess.run([*command, "-fopenmp"], check=True, capture_output=True, timeout=_TIMEOUT_S)
            except subprocess.CalledProcessError:  # a compiler without OpenMP: one thread
                subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
            os.replace(built, library)
    return library


def _writable_cache() -> Path | None:
    """Return a folder in the home folder that only this user writes; None where there can be none."""
    folder = Path.home() / _CACHE
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home folder
        pass
    return None


def _processor() -> bytes:
    """Tell processors apart by what they can do."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    return b"\n".join(sorted({line for line in lines if line.split(b"\t")[0] in (b"flags", b"model name", b"Features", b"CPU part")}))
