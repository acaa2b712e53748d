"""Report: what tuning gained, measured anew; page.py writes it down.

    tvm        TVM's own default for a plain int8 matmul of the shape (baseline.py), by itself
    default    the first family, the first value of every knob
    tuned      what a build for this machine takes from the records
    transfer   what is best for the other shapes of the same op, on this one (transfer.py)

The last three run in the same rounds; a gain whose 99 % interval holds 1 is called none. The whole
model is the sum of the tuned kernels' calls, and, where the model's weights are there, the
tokens/s of runtime.bench on builds without and with records, alternating.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compiler.config import NO_RECORDS, BuildError
from compiler.kernels import Choice, KernelTable
from compiler.records import describe
from compiler.tuning import baseline, store, transfer
from compiler.tuning.candidates import UNPACKED, Builder, Candidate
from compiler.tuning.case_files import add_weights, make_files
from compiler.tuning.lookup import Lookup
from compiler.tuning.pool import RunError, Worker
from compiler.tuning.statistics import Gain, gain
from compiler.tuning.tasks import Task
from compiler.tuning.transfer import Moved

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
    moved: dict[str, Moved] = field(default_factory=dict)  # by the shape that it is best for

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
    choices = {key: choice for key, (choice, _) in chosen.items()}
    picks = transfer.picks(tasks, choices, at.lookup, at.weigh)
    for task in tasks:
        say(f"measuring {task.op.name} {task.shape}")
        alike = [t for t in tasks if t.op.name == task.op.name and t.key in picks]
        moved = {t.shape: picks[t.key] for t in sorted(alike, key=lambda t: t.key != task.key)}
        with tempfile.TemporaryDirectory(prefix="report-") as folder:
            try:
                yield measure_task(task, *chosen[task.key], moved, at, Path(folder))
            except RunError as error:
                raise BuildError(f"report: {task.op.name} {task.shape}: {error}") from error


def choose(task: Task, lookup: Lookup) -> tuple[Choice, str]:
    """As compiler.kernels.KernelTable chooses."""
    table = KernelTable(task.target, lookup)
    schedule = table.choose(task.op.name, task.folder, task.sizes, task.make)
    return schedule.choice, table.origin(task.op.name, task.sizes)


def measure_task(
    task: Task,
    choice: Choice,
    origin: str,
    picks: Mapping[str, Choice],
    at: Measuring,
    folder: Path,
) -> Row:
    """The default, the choice and the picks (by shape) in the same rounds."""
    builder = Builder(task, folder, at.linker)
    files = make_files(task, folder, at.weigh, at.cold_bytes)
    built: dict[Choice, Candidate | str] = {}
    for wanted in dict.fromkeys((task.default, choice, *picks.values())):
        built[wanted] = transfer.build(builder, wanted, built)
        if isinstance(candidate := built[wanted], Candidate):
            add_weights(files, candidate)
    at.worker.set_task(files)
    checked = {wanted: check(candidate, at.worker) for wanted, candidate in built.items()}
    right = {wanted: c for wanted, c in checked.items() if isinstance(c, Candidate)}
    for needed in (task.default, choice):
        if needed not in right:
            raise BuildError(
                f"report: {task.op.name} {task.shape} {describe(needed)}: {checked[needed]}"
            )
    libraries = {c.version: (c.library, c.layout) for c in right.values()}
    rows = task.rows(at.weigh)
    raced = at.worker.race(list(libraries.values()), rows, ROUNDS, SECONDS, LIMIT)
    by_version = dict(zip(libraries, raced, strict=True))
    times = {wanted: by_version[c.version] for wanted, c in right.items()}
    return Row(
        task,
        choice,
        origin,
        measure_baseline(task, files, at, folder),
        times[task.default],
        times[choice],
        {
            shape: Moved(pick, times.get(pick) or str(checked[pick]))
            for shape, pick in picks.items()
        },
    )


def check(candidate: Candidate | str, worker: Worker) -> Candidate | str:
    """The candidate if it gives the reference's bits, else why it is not to be timed."""
    if isinstance(candidate, str):
        return candidate
    try:
        result = worker.check(candidate.library, candidate.layout, LIMIT)
    except RunError as error:
        return str(error)
    return candidate if result == store.OK else result


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
