"""Progress for people: a bar at a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINES = 10  # lines printed for a whole task where there is no terminal


class Report(Protocol):
    """Tell the bar where the work stands."""

    def __call__(self, done: int, note: str = "") -> None:
        """`done` of the total is done."""


@contextmanager
def progress_bar(title: str, total: int, every: int = 0) -> Iterator[Report]:
    """Show the progress of `total` units of work; without a terminal a line each `every` units, or ten if 0."""
    console = Console()
    if not sys.stdout.isatty():
        yield _lines(console, title, total, every)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, note="")

        def report(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield report


def _lines(console: Console, title: str, total: int, every: int) -> Report:
    every = every or max(1, total // _LINES)

    def report(done: int, note: str = "") -> None:
        if done % every == 0 or done == total:
            console.print(f"{title}: {done}/{total} {note}".rstrip(), highlight=False)

    return report
