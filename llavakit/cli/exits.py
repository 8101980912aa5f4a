"""Exit codes, and the one place where exceptions of a command end.

Codes: 0 done, 1 what was compared differs, 2 usage, 3 checkpoint, 4 bad input, 5 capacity, 6 files, training or scores, 70 a bug,
130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

from cyclopts import CycloptsError

from llavakit.errors import CapacityError, CheckpointError, ConfigError, InputError, LlavaError

__all__ = ["run_command"]

_USAGE, _BUG, _INTERRUPTED = 2, 70, 130
_CODES: tuple[tuple[type[LlavaError], int], ...] = (
    (ConfigError, _USAGE),
    (CheckpointError, 3),
    (InputError, 4),
    (CapacityError, 5),
    (LlavaError, 6),
)


def run_command(command: Callable[[], object]) -> int:
    """Run a command and turn what it raises into one line on stderr and an exit code; a command may return its own."""
    try:
        code = command()
        sys.stdout.flush()
    except LlavaError as error:
        sys.stderr.write(f"llava: {error}\n")
        return next(code for kind, code in _CODES if isinstance(error, kind))
    except CycloptsError as error:
        sys.stderr.write(f"llava: {' '.join(str(error).split())}; --help shows the usage\n")
        return _USAGE
    except KeyboardInterrupt:
        sys.stderr.write("\nllava: interrupted\n")
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 0
    except MemoryError:
        sys.stderr.write("llava: out of memory; choose a smaller model or dtype\n")
        return 5
    except Exception as error:  # the process edge: anything else is a bug, said in one line unless asked
        if os.environ.get("LLAVA_TRACEBACK"):
            traceback.print_exc()
        sys.stderr.write(f"llava: internal error: {type(error).__name__}: {error}; set LLAVA_TRACEBACK=1 to see where, and report it\n")
        return _BUG
    return code if isinstance(code, int) else 0
