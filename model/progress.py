"""Show where a training run stands: a bar on a terminal, a line each report elsewhere.

The bar (rich, on stderr) carries the loss, tokens/s and the time left, all three measured between
two reports: between them only the step count moves, because the loss is on the device until then.
Without rich, or with stderr in a file, every report is one line on stdout.
"""

import sys
from dataclasses import dataclass
from typing import TextIO


@dataclass(frozen=True)
class Status:
    """One report of a run."""

    step: int  # steps done
    steps: int
    stage: str
    loss: float  # mean since the last report, nats a token
    learning_rate: float
    tokens_a_second: float
    seconds_left: float

    @property
    def left(self) -> str:
        return f"{self.seconds_left // 60:.0f}m{self.seconds_left % 60:02.0f}s left"

    @property
    def rate(self) -> str:
        return f"{self.tokens_a_second / 1e3:.0f}k tok/s"


class Lines:
    """A line a report."""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def report(self, status: Status) -> None:
        print(
            f"step {status.step}/{status.steps} {status.stage} loss {status.loss:.4f} "
            f"lr {status.learning_rate:.2e} {status.rate} {status.left}",
            flush=True,
        )


class Bar(Lines):
    """A rich progress bar; what is printed meanwhile goes above it. Raises ImportError."""

    def __init__(self, steps: int, step: int, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("{task.fields[stage]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=Console(file=stream),
            redirect_stdout=sys.stdout.isatty(),  # a stdout in a file keeps its lines
        )
        self.task = self.progress.add_task(
            "train", total=steps, completed=step, stage="train", facts=""
        )

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def report(self, status: Status) -> None:
        facts = f"loss {status.loss:.4f}  {status.rate}  {status.left}"
        self.progress.update(self.task, completed=status.step, stage=status.stage, facts=facts)


def of_run(steps: int, step: int, stream: TextIO) -> Lines:
    """The bar where `stream` is a terminal and rich is installed, else lines."""
    if not stream.isatty():
        return Lines()
    try:
        return Bar(steps, step, stream)
    except ImportError:
        return Lines()
