"""Live: the table of a tuning run, redrawn on a terminal, one line a finished task elsewhere."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from compiler.tuning.session import Session
from compiler.tuning.under_way import Progress


def row(progress: Progress) -> list[str]:
    """op, shape, share, trials, best, gain, state"""
    return [
        progress.task.op.name,
        progress.task.shape,
        f"{100 * progress.share:.0f} %" if progress.share else "",
        trials(progress),
        best(progress),
        gain(progress),
        progress.state + (f", {progress.failed} failed" if progress.failed else ""),
    ]


def trials(progress: Progress) -> str:
    """Made and to be made; a session that goes on may have had more than this one allots."""
    if progress.allotted is None:
        return ""
    return f"{progress.trials}/{max(progress.trials, progress.allotted)}"


def gain(progress: Progress) -> str:
    """What the race found, or, in brackets, what the search promises so far."""
    if progress.result:
        return str(progress.result)
    return f"({1 / progress.best:.2f}x)" if progress.trials else ""


def best(progress: Progress) -> str:
    """Time of a call by rows: of the default, as a share of which the best is known."""
    if progress.default is None:
        return ""
    ratio = progress.result.ratio if progress.result else 1 / progress.best
    times = (f"{median(seconds) / ratio * 1e6:.0f}" for seconds in progress.default.values())
    return " / ".join(times)


HEADER = ("op", "shape", "time", "trials", "best, us", "gain", "")


def render(rows: Sequence[Progress], seconds_left: float | None) -> Group:
    table = Table(*HEADER, box=None, pad_edge=False)
    for progress in rows:
        table.add_row(*row(progress))
    left = "" if seconds_left is None else f"about {seconds_left / 60:.0f} min left; "
    note = f"{left}Ctrl-C stops and keeps what is measured, --resume goes on"
    return Group(table, Text(note, style="dim"))


@contextmanager
def showing(session: Session) -> Iterator[Callable[[], None]]:
    """Shows the session's progress on stderr; the function is to be called when it changes."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        told: set[int] = set()

        def tell() -> None:
            for i, progress in enumerate(session.progress):
                if progress.is_over and i not in told:
                    told.add(i)
                    console.print("  ".join(row(progress)), highlight=False, soft_wrap=True)

        yield tell
        return
    with Live(console=console, auto_refresh=False) as live:

        def redraw() -> None:
            live.update(render(session.progress, session.seconds_left()), refresh=True)

        yield redraw
