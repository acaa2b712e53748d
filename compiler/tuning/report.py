"""Report: what tuning gained, measured anew: a table, a plot and the figures.

    tvm        TVM's own default for a plain int8 matmul of the shape (baseline.py), by itself
    default    the first family, the first value of every knob
    tuned      what a build for this machine takes from the records
    transfer   what was chosen for another shape of the same op, on this one

The last three run in the same rounds; a gain whose 99 % interval holds 1 is called none. The whole
model is the sum of the tuned kernels' calls, and, where the model's weights are there, the
tokens/s of runtime.bench on builds without and with records, alternating.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from compiler.config import NO_RECORDS, BuildError
from compiler.kernels import Choice, KernelTable
from compiler.records import describe
from compiler.tuning import baseline, store
from compiler.tuning.candidates import UNPACKED, Builder
from compiler.tuning.case_files import add_weights, make_files
from compiler.tuning.lookup import Lookup
from compiler.tuning.pool import Worker
from compiler.tuning.statistics import Gain, gain, spread
from compiler.tuning.tasks import Task

ROUNDS, SECONDS, LIMIT = 61, 30.0, 300.0
BASELINE_ROUNDS, BASELINE_SECONDS = 15, 5.0
BENCH_TURNS = 8  # the fewest that have a 99 % interval
BENCH = ("-p", "128", "-n", "64", "-r", "1", "-o", "json")


@dataclass
class Row:
    """One task: seconds by rows of M, a round each."""

    task: Task
    choice: Choice
    origin: str
    tvm: dict[int, list[float]]
    default: dict[int, list[float]]
    tuned: dict[int, list[float]]
    transfers: dict[str, dict[int, list[float]]] = field(default_factory=dict)  # by shape

    def gain(self, weigh: str) -> Gain:
        return gain(self.task.costs(self.default, weigh), self.task.costs(self.tuned, weigh))


@dataclass(frozen=True)
class Measuring:
    """What a report needs besides tasks."""

    worker: Worker
    linker: str
    cold_bytes: int
    weigh: str
    lookup: Lookup


def measure(tasks: Sequence[Task], at: Measuring, say=lambda line: None) -> Iterator[Row]:
    chosen = {task.key: choose(task, at.lookup) for task in tasks}
    for task in tasks:
        say(f"measuring {task.op.name} {task.shape}")
        with tempfile.TemporaryDirectory(prefix="report-") as folder:
            yield measure_task(task, chosen, tasks, at, Path(folder))


def choose(task: Task, lookup: Lookup) -> tuple[Choice, str]:
    """As compiler.kernels.KernelTable chooses."""
    table = KernelTable(task.target, lookup)
    schedule = table.choose(task.op.name, task.folder, task.sizes, task.make)
    return schedule.choice, table.origin(task.op.name, task.sizes)


def measure_task(
    task: Task, chosen: dict, tasks: Sequence[Task], at: Measuring, folder: Path
) -> Row:
    builder = Builder(task, folder, at.linker)
    files = make_files(task, folder, at.weigh, at.cold_bytes)
    choice, origin = chosen[task.key]
    others = {
        other.shape: chosen[other.key][0]
        for other in tasks
        if other.op.name == task.op.name and other.key != task.key
    }
    candidates = {}
    for wanted in (task.default, choice, *others.values()):
        if wanted not in candidates and (built := builder.build(wanted)):
            add_weights(files, built)
            candidates[wanted] = built
    at.worker.set_task(files)
    for wanted, candidate in list(candidates.items()):
        result = at.worker.check(candidate.library, candidate.layout, LIMIT)
        if result != store.OK:
            raise BuildError(f"report: {task.op.name} {task.shape} {describe(wanted)}: {result}")
    libraries = [(candidate.library, candidate.layout) for candidate in candidates.values()]
    rows = task.rows(at.weigh)
    found = at.worker.race(libraries, rows, ROUNDS, SECONDS, LIMIT)
    times = dict(zip(candidates, found, strict=True))
    return Row(
        task,
        choice,
        origin,
        measure_baseline(task, files, at, folder),
        times[task.default],
        times.get(choice) or times[task.default],  # where a choice is the same kernel
        {shape: times[other] for shape, other in others.items() if other in times},
    )


def measure_baseline(task: Task, files: dict, at: Measuring, folder: Path) -> dict:
    at.worker.set_task(baseline.make_files(task, files, folder))
    times: dict[int, list[float]] = {}
    for rows in task.rows(at.weigh):
        path = folder / f"tvm{rows}.so"
        baseline.build(task, rows, path, at.linker)
        limits = BASELINE_ROUNDS, BASELINE_SECONDS, LIMIT
        times.update(at.worker.race([(path, UNPACKED)], [rows], *limits)[0])
    return times


def bench(model: str, target: str, threads: int, records: str | None, say) -> dict[str, list]:
    """tokens/s by test, of builds without and with records, alternating: {"default": ...}"""
    found: dict[str, list] = {"default": [], "tuned": []}
    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        for name, option in (("default", NO_RECORDS), ("tuned", records)):
            say(f"building {model}, {name}")
            command = ["compiler.build", "--model", model, "--target", target]
            command += ["-o", f"{folder}/{name}", *(["--records", option] if option else [])]
            run_module(command)
        for turn in range(BENCH_TURNS):
            say(f"benchmarking {model}, {turn + 1} of {BENCH_TURNS}")
            for name in found if turn % 2 == 0 else reversed(found):
                command = ["runtime.bench", f"{folder}/{name}", *BENCH, "-t", str(threads)]
                found[name].append(json.loads(run_module(command)))
    return found


def run_module(command: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise BuildError(f"report: {command[0]} failed: {lines[-1]}")
    return done.stdout


def cell(times: dict[int, list[float]], rows: int) -> str:
    return f"{median(times[rows]) * 1e6:.0f} ± {100 * spread(times[rows]):.0f} %"


def table(rows: Sequence[Row], weigh: str) -> list[str]:
    lines = [
        "| op | shape | M | TVM's default, us | template default, us | tuned, us | gain "
        "| 99 % interval | chosen | from |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for m in row.task.rows(weigh):
            of = gain(row.default[m], row.tuned[m])
            sizes = [cell(times, m) for times in (row.tvm, row.default, row.tuned)]
            lines.append(
                f"| {row.task.op.name} | {row.task.shape} | {m} | {' | '.join(sizes)} "
                f"| {of} | {of.low:.2f} to {of.high:.2f} | {describe(row.choice)} | {row.origin} |"
            )
    return lines


def totals(rows: Sequence[Row]) -> list[str]:
    """All tuned kernels' calls in a step and in a prompt, from the medians."""
    lines = ["| | TVM's default, ms | template default, ms | tuned, ms |", "|---|---|---|---|"]
    for weigh, name in (("decode", "a decode step"), ("prefill", "a prompt of 128")):
        sums = [
            sum(
                row.task.seconds({m: median(seconds) for m, seconds in times(row).items()}, weigh)
                for row in rows
            )
            for times in (lambda r: r.tvm, lambda r: r.default, lambda r: r.tuned)
        ]
        lines.append(f"| {name} | " + " | ".join(f"{1e3 * s:.2f}" for s in sums) + " |")
    return lines


def transfers(rows: Sequence[Row], weigh: str) -> list[str]:
    lines = [
        "| op | shape | its own choice, against the default | the choice for another shape |",
        "|---|---|---|---|",
    ]
    for row in rows:
        base = row.task.costs(row.default, weigh)
        found = [
            f"{shape}: {gain(base, row.task.costs(times, weigh))}"
            for shape, times in row.transfers.items()
        ]
        if found:
            own = row.gain(weigh)
            lines.append(f"| {row.task.op.name} | {row.task.shape} | {own} | {'; '.join(found)} |")
    return lines if len(lines) > 2 else ["One shape an op: nothing to transfer."]


def bench_table(found: dict[str, list]) -> list[str]:
    """tokens/s: medians of the turns, and the gain of turns side by side."""
    lines = [
        "| test | template default, tokens/s | tuned, tokens/s | gain | 99 % interval |",
        "|---|---|---|---|---|",
    ]
    names = [row["test"] for row in found["default"][0]]
    for i, name in enumerate(names):
        cells, times = [], []
        for build in ("default", "tuned"):
            speeds = [turn[i]["tokens_per_second"] for turn in found[build]]
            cells.append(f"{median(speeds):.1f} ({min(speeds):.1f} to {max(speeds):.1f})")
            times.append([1 / speed for speed in speeds])
        of = gain(*times)
        cells += [str(of), f"{of.low:.2f} to {of.high:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def write(
    directory: Path, title: str, rows: Sequence[Row], weigh: str, benched: dict | None
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    whole = bench_table(benched) if benched else ["No weights: only kernels are measured."]
    lines = [
        f"# Tuning: {title}",
        "",
        f"{time.strftime('%Y-%m-%d')}. Cold weights; medians of interleaved rounds ± half of the "
        "range between the quartiles; TVM's default apart. A gain is of the template's default.",
        "",
        *table(rows, weigh),
        "",
        "## The model: sum of these kernels' calls",
        "",
        *totals(rows),
        "",
        "## The model, run",
        "",
        *whole,
        "",
        "## Transfer from shape to shape",
        "",
        *transfers(rows, weigh),
        "",
    ]
    path = directory / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    figures = [
        {
            "op": row.task.op.name,
            "sizes": dict(row.task.sizes),
            "chosen": describe(row.choice),
            "from": row.origin,
            "seconds": {"tvm": row.tvm, "default": row.default, "tuned": row.tuned},
            "transfers": row.transfers,
        }
        for row in rows
    ]
    content = {"title": title, "kernels": figures, "bench": benched}
    (directory / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot(directory / "report.png", title, rows, weigh)
    return path


def plot(path: Path, title: str, rows: Sequence[Row], weigh: str) -> None:
    """Speed relative to the template's default, a panel for each M; whiskers: the quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({m for row in rows for m in row.task.rows(weigh)})
    figure, panels = pyplot.subplots(
        len(counts), 1, figsize=(9, 1.5 + 2.6 * len(counts)), squeeze=False
    )
    for panel, m in zip(panels[:, 0], counts, strict=True):
        here = [row for row in rows if m in row.task.rows(weigh)]
        bars = (("TVM's default", "tvm"), ("template default", "default"), ("tuned", "tuned"))
        for offset, (label, name) in enumerate(bars):
            times = [getattr(row, name)[m] for row in here]
            base = [median(row.default[m]) for row in here]
            height = [b / median(t) for b, t in zip(base, times, strict=True)]
            whisker = [h * spread(t) for h, t in zip(height, times, strict=True)]
            at = [i + 0.27 * (offset - 1) for i in range(len(here))]
            panel.bar(at, height, 0.25, yerr=whisker, label=label)
        names = [f"{row.task.op.name}\n{row.task.shape}" for row in here]
        panel.set_xticks(range(len(here)), names, fontsize=6)
        panel.set_ylabel(f"speed at M = {m},\ndefault = 1", fontsize=8)
        panel.axhline(1, color="black", linewidth=0.5)
    panels[0, 0].legend(fontsize=7)
    panels[0, 0].set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
