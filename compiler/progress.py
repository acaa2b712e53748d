"""Progress of a build on stderr: the phase, how far it is, about how long it still takes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# Seconds of each phase for a model of 12 layers on two cores, by which the bar moves.
PHASES = {"export": 7.0, "lower": 4.0, "pack weights": 2.0, "compile kernels": 12.0, "write": 1.0}


class BuildProgress:
    """`phase(name)` brackets a phase; `advance(share)` moves within it."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._seconds = 0.0
        if progress is not None:
            self._task = progress.add_task("start", total=sum(PHASES.values()))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._seconds = PHASES[name]
        if self._progress is None:
            yield
            return
        self._progress.update(self._task, description=name)
        done = self._progress.tasks[self._task].completed
        yield
        self._progress.update(self._task, completed=done + self._seconds)

    def say(self, line: str) -> None:
        """A line that stays."""
        if self._progress is not None:
            self._progress.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr)

    def advance(self, share: float) -> None:
        if self._progress is not None:
            self._progress.advance(self._task, share * self._seconds)


@contextmanager
def on_stderr() -> Iterator[BuildProgress]:
    """A bar where stderr is a terminal, nothing where it is not."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    if not sys.stderr.isatty():
        yield BuildProgress()
        return
    with Progress(*columns, console=console, transient=True) as progress:
        yield BuildProgress(progress)
