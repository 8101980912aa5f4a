"""In which dtype and on which device a model is to lie, from the names that users give."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from llavakit.errors import ConfigError

__all__ = ["WEIGHT_KEYS", "choose_device", "choose_dtype", "common_dtype_name", "dtype_name"]

WEIGHT_KEYS = ("dtype", "torch_dtype", "quantization_config")
"""What config.json says of the weights in its own folder; it is wrong of others."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_dtype(asked: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype asked for; None, for None and "auto", is that of the files. Raises: ConfigError."""
    if asked is None or asked == "auto":
        return None
    chosen = _DTYPES.get(asked.removeprefix("torch.")) if isinstance(asked, str) else asked
    if chosen not in _DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(_DTYPES)} or auto, got {asked!r}")
    return chosen


def common_dtype_name(dtypes: Iterable[torch.dtype]) -> str:
    """Return the name of the narrowest dtype that holds all of them, as config.json states it."""
    return dtype_name(functools.reduce(torch.promote_types, dtypes))


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as files have it."""
    return str(dtype).removeprefix("torch.")


def choose_device(asked: torch.device | str) -> torch.device:
    """Return the device asked for, once something could be put there; "auto" is CUDA where there is one. Raises: ConfigError."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(asked)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"a device is auto, cpu, cuda or cuda:N, got {asked!r}; a model lies on one device") from error
    if chosen.type == "meta":
        raise ConfigError("the meta device holds no numbers; build a model there from its config, or load it on cpu, cuda or cuda:N")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:  # each backend has its own way to be absent
        num_cuda = torch.cuda.device_count()
        raise ConfigError(f"there is no device {chosen}: this machine has {num_cuda} CUDA devices; use cpu or auto") from error
    return chosen
