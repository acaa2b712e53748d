"""The table and the plots of what benchmarks/cpu.py measured."""

import statistics
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = "ours"
PLOTS = ("threads", "context", "bytes")


@dataclass
class Row:
    """One measurement of several engines. Samples are seconds; `amount` of `unit` was done in
    each (a unit of us: calls), at least `floor` bytes had to be read for it. `bandwidth` is the
    streaming read's, in bytes/s, between those samples; 0 where no time was taken for it."""

    group: str
    test: str
    threads: int
    amount: float
    unit: str
    samples: dict[str, list[float]]
    floor: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0

    def rate(self, engine: str) -> float:
        return self.amount / statistics.median(self.samples[engine])

    def spread(self, engine: str) -> tuple[float, float]:
        found = self.samples[engine]
        return self.amount / max(found), self.amount / min(found)


def show_samples(row: Row, engine: str) -> str:
    """Median (range): a rate, or a call's time."""
    found, (low, high), unit = row.rate(engine), row.spread(engine), f"{row.unit}/s"
    if row.unit == "us":
        found, low, high, unit = 1e6 / found, 1e6 / high, 1e6 / low, "us"
    return f"{found:.4g} ({low:.4g}-{high:.4g}) {unit}"


def show_row(engines: Collection[str], row: Row) -> str:
    """A line of the table."""
    cells = [row.group, row.test, str(row.threads)]
    for name in engines:
        if name not in row.samples:
            cells.append("")
            continue
        cells.append(show_samples(row, name))
    for name in engines:
        if name != OURS:
            both = name in row.samples
            cells.append(f"{row.rate(OURS) / row.rate(name):.2f}" if both else "")
    share = ""
    if row.floor:
        seconds = statistics.median(row.samples[OURS])
        share = f"{row.floor[OURS] / seconds / row.bandwidth:.0%}"
    return "| " + " | ".join([*cells, share]) + " |"


def table(facts: dict[str, Any], engines: Collection[str], rows: list[Row]) -> str:
    heads = ["group", "test", "threads", *engines]
    heads += [f"ours / {name}" for name in engines if name != OURS] + ["ours of the streaming read"]
    lines = [f"{key}: {value}  " for key, value in facts.items()]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(show_row(engines, row) for row in rows)]) + "\n"


def plot(engines: Collection[str], measured: list[Row], folder: Path) -> None:
    """threads.png, context.png, bytes.png; those for which there are rows, and none of a page
    that was there before."""
    for name in PLOTS:
        (folder / f"{name}.png").unlink(missing_ok=True)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("benchmarks.cpu: no plots: matplotlib is not installed", file=sys.stderr)
        return
    decode = [r for r in measured if r.group == "model" and r.test.startswith("tg")]
    deep = [r for r in measured if r.group == "context"]
    for name, rows, label in (("threads", decode, "threads"), ("context", deep, "context, tokens")):
        if not rows:
            continue
        axes = Figure(figsize=(6, 4)).subplots()
        for engine in engines:
            x = [r.threads if name == "threads" else int(r.test.split()[-1]) for r in rows]
            axes.plot(x, [r.rate(engine) for r in rows], marker="o", label=engine)
        axes.set(xlabel=label, ylabel="decoded tokens/s", ylim=(0, None))
        if name == "threads":
            axes.set_xticks(sorted(set(x)))
        axes.legend()
        axes.figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    if decode:
        last = decode[-1]
        axes = Figure(figsize=(6, 4)).subplots()
        floor = [last.floor[e] / last.amount / 1e6 for e in engines]
        spent = [last.bandwidth / last.rate(e) / 1e6 for e in engines]
        places = range(len(engines))
        axes.bar([p - 0.2 for p in places], floor, 0.4, label="weights a token needs")
        axes.bar([p + 0.2 for p in places], spent, 0.4, label="what memory gives in its time")
        axes.set(xticks=list(places), xticklabels=engines, ylabel="MB a token")
        axes.legend()
        axes.figure.savefig(folder / "bytes.png", dpi=150, bbox_inches="tight")
