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

__all__ = ["Attention", "Kernels", "LayerWeights", "Weight", "load_kernels"]

_LOG = logger("ops")
_FOLDER = Path(__file__).parent
_SOURCES = ("paged_attention.c", "matmul.c", "gate.c", "norm.c", "rotary.c", "layer.c")
_HEADERS = ("kernels.h", "lanes.h")
_FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-fvisibility=protected", "-fno-math-errno", "-ffp-contract=fast")
_CACHE = Path(".cache") / "llavakit"
_TIMEOUT_S = 120


def _fields(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Attention(ctypes.Structure):
    """The arguments of one call, as kernels.h has them; so for the others."""

    _fields_ = (
        *_fields("q k v o keys values slots positions starts tables", ctypes.c_void_p),
        *_fields("num_sequences table_width num_heads num_kv_heads head_dim width window", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        *_fields("x w bias y", ctypes.c_void_p),
        *_fields("num_rows num_outputs num_steps", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
    )


class _NormRows(ctypes.Structure):
    _fields_ = (
        *_fields("x added weight sum y", ctypes.c_void_p),
        *_fields("num_rows width", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
    )


class _RotaryRows(ctypes.Structure):
    _fields_ = (
        *_fields("x cos sin q k v", ctypes.c_void_p),
        *_fields("num_tokens num_heads num_kv_heads head_dim", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
    )


class _GateRows(ctypes.Structure):
    _fields_ = (
        *_fields("gate up out", ctypes.c_void_p),
        *_fields("num_rows width stride out_stride", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
    )


class Weight(ctypes.Structure):
    """A packed weight and its bias."""

    _fields_ = (*_fields("w bias", ctypes.c_void_p), *_fields("num_outputs num_steps", ctypes.c_int64))


class LayerWeights(ctypes.Structure):
    """A decoder layer, as layer.c has it; whoever makes one keeps its tensors alive."""

    _fields_ = (
        *_fields("qkv out gate_up down", Weight),
        *_fields("input_norm inner_norm", ctypes.c_void_p),
        *_fields("width inner filled num_heads num_kv_heads head_dim", ctypes.c_int64),
        *_fields("input_eps inner_eps", ctypes.c_float),
    )


class _LayerRows(ctypes.Structure):
    _fields_ = (
        *_fields("layer x cos sin attended q k v y scratch", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
    )


class Kernels:
    """The compiled functions; tensors must be contiguous, on the CPU, and float32 or bfloat16, all of a call alike."""

    def __init__(self, library: ctypes.CDLL) -> None:
        functions = [library.attend, library.matmul, library.gate, library.norm, library.rotary]
        functions += [library.before_attention, library.after_attention]
        for function in functions:
            function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int32], None
        self._attend, self._matmul, self._gate, self._norm, self._rotary, self._before, self._after = functions
        self.half_inputs: int = library.half_inputs()
        """Inputs of a product in bfloat16 are filled up to a multiple of this."""

    def attend(self, arguments: Attention, *, is_half: bool) -> None:
        """Store new keys and values, and fill the output rows."""
        self._attend(ctypes.byref(arguments), is_half)

    def matmul(self, x_MI: Tensor, panels: Tensor, bias: Tensor | None, num_outputs: int) -> Tensor:
        """Multiply by a weight in panels [P, steps, 64 (, 2)] of the same dtype: y [M, num_outputs]."""
        x_MI = x_MI.contiguous()
        y_MO = x_MI.new_empty(x_MI.shape[0], num_outputs)
        bias_at = None if bias is None else bias.data_ptr()
        given = _Product(
            x_MI.data_ptr(),
            panels.data_ptr(),
            bias_at,
            y_MO.data_ptr(),
            x_MI.shape[0],
            num_outputs,
            panels.shape[1],
            torch.get_num_threads(),
        )
        self._matmul(ctypes.byref(given), x_MI.dtype == torch.bfloat16)
        return y_MO

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up."""
        gate, up = gate.contiguous(), up.contiguous()
        return self._gated(gate.data_ptr(), up.data_ptr(), torch.empty_like(gate), 1, gate.numel(), gate.numel())

    def gate_halves(self, x_TG: Tensor) -> Tensor:
        """Return silu(first half of each row) * second half."""
        num_rows, width = x_TG.shape[0], x_TG.shape[1] // 2
        gate = x_TG.data_ptr()
        return self._gated(gate, gate + width * x_TG.itemsize, x_TG.new_empty(num_rows, width), num_rows, width, 2 * width)

    def _gated(self, gate: int, up: int, out: Tensor, num_rows: int, width: int, stride: int) -> Tensor:
        given = _GateRows(gate, up, out.data_ptr(), num_rows, width, stride, width, torch.get_num_threads())
        self._gate(ctypes.byref(given), out.dtype == torch.bfloat16)
        return out

    def norm(self, x_TD: Tensor, weight_D: Tensor, eps: float, added_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x, or x + added, and its norm."""
        y_TD = torch.empty_like(x_TD)
        sum_TD = x_TD if added_TD is None else torch.empty_like(x_TD)
        added_at = None if added_TD is None else added_TD.data_ptr()
        pointers = x_TD.data_ptr(), added_at, weight_D.data_ptr(), sum_TD.data_ptr(), y_TD.data_ptr()
        self._norm(ctypes.byref(_NormRows(*pointers, *x_TD.shape, eps, torch.get_num_threads())), x_TD.dtype == torch.bfloat16)
        return sum_TD, y_TD

    def rotary(self, x_TX: Tensor, cos_T1H: Tensor, sin_T1H: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Part rows of queries, keys and values, and rotate the first two: q_TNH, k_TKH, v_TKH."""
        sizes = x_TX.shape[0], num_heads, num_kv_heads, cos_T1H.shape[-1]
        q_TNH, k_TKH, v_TKH = _heads(x_TX, *sizes)
        pointers = (tensor.data_ptr() for tensor in (x_TX, cos_T1H, sin_T1H, q_TNH, k_TKH, v_TKH))
        self._rotary(ctypes.byref(_RotaryRows(*pointers, *sizes, torch.get_num_threads())), x_TX.dtype == torch.bfloat16)
        return q_TNH, k_TKH, v_TKH

    def before_attention(self, layer: LayerWeights, x_TD: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run a layer up to its attention: norm, product and rotary() at once."""
        num_tokens, head_dim = x_TD.shape[0], layer.head_dim
        q_TNH, k_TKH, v_TKH = _heads(x_TD, num_tokens, layer.num_heads, layer.num_kv_heads, head_dim)
        scratch = x_TD.new_empty(num_tokens * (layer.width + (layer.num_heads + 2 * layer.num_kv_heads) * head_dim))
        given = _LayerRows(
            layer=ctypes.addressof(layer),
            x=x_TD.data_ptr(),
            cos=cos_T1H.data_ptr(),
            sin=sin_T1H.data_ptr(),
            q=q_TNH.data_ptr(),
            k=k_TKH.data_ptr(),
            v=v_TKH.data_ptr(),
            scratch=scratch.data_ptr(),
            num_rows=num_tokens,
            num_threads=torch.get_num_threads(),
        )
        self._before(ctypes.byref(given), x_TD.dtype == torch.bfloat16)
        return q_TNH, k_TKH, v_TKH

    def after_attention(self, layer: LayerWeights, x_TD: Tensor, attended_TNH: Tensor) -> Tensor:
        """Run a layer on from its attention: product, sum, norm, feed-forward and sum at once."""
        attended_TNH = attended_TNH.contiguous()
        y_TD, scratch = torch.empty_like(x_TD), x_TD.new_empty(x_TD.shape[0] * (3 * layer.width + 2 * layer.inner + layer.filled))
        given = _LayerRows(
            layer=ctypes.addressof(layer),
            x=x_TD.data_ptr(),
            attended=attended_TNH.data_ptr(),
            y=y_TD.data_ptr(),
            scratch=scratch.data_ptr(),
            num_rows=x_TD.shape[0],
            num_threads=torch.get_num_threads(),
        )
        self._after(ctypes.byref(given), x_TD.dtype == torch.bfloat16)
        return y_TD


def _heads(x: Tensor, num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for queries, keys and values."""
    k_TKH, v_TKH = x.new_empty(2, num_tokens, num_kv_heads, head_dim).unbind()
    return x.new_empty(num_tokens, num_heads, head_dim), k_TKH, v_TKH


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
