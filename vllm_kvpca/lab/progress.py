"""Progress bars on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text


@contextmanager
def steps(title: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on stderr; the function it yields marks one step as done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def tokens(console: Console, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar with tokens per second and the time left; the function it yields adds tokens.

    Args:
        done: tokens of an earlier run, which count for neither.
    """
    columns = (
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # The rate is that of all the last windows that rich keeps: one may take a CPU minutes, and what
    # is done in rich's own half a minute is then none at all.
    ever = float("inf")
    with Progress(*columns, console=console, expand=True, speed_estimate_period=ever) as progress:
        task = progress.add_task("", total=total, completed=done)
        progress.advance(task, 0)  # rates are taken from here on: there is one after one window
        yield lambda count: progress.advance(task, count)


class _Rate(ProgressColumn):
    """Tokens per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "-/s", style="progress.data.speed")
