"""How much of some work is done, shown on stderr.

Owns: progress_bar.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(total: int, *, is_shown: bool) -> Iterator[Callable[[int], object]]:
    """Show a bar where that is wanted; gives what is told how many more are done."""
    if not is_shown:
        yield lambda count: count
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)
