"""Transfer: whether what is quick for one shape is so for another of the same op.

A shape's pick is what a build takes for it; where that is the default, the quickest besides it of
the last race, else of the search, whether or not it gained: where every default stays, the picks
still tell whether choices transfer. A report races each pick on every shape of its op, in the same
rounds as that shape's default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compiler.kernels import Choice, version_of
from compiler.records import describe
from compiler.tuning.candidates import Builder, Candidate
from compiler.tuning.lookup import Lookup
from compiler.tuning.recall import current, recall
from compiler.tuning.statistics import gain
from compiler.tuning.tasks import Task, Times

if TYPE_CHECKING:
    from compiler.tuning.report import Row


@dataclass(frozen=True)
class Moved:
    """A shape's pick on some shape of the same op."""

    choice: Choice
    found: Times | str  # seconds by rows, a round each; or why it does not run there


def picks(
    tasks: Sequence[Task], chosen: Mapping[tuple, Choice], lookup: Lookup, weigh: str
) -> dict[tuple, Choice]:
    """By task, of ops that several tasks have; a task that only its default was measured of has
    none."""
    names = [task.op.name for task in tasks]
    several = [task for task in tasks if names.count(task.op.name) > 1]
    found = {task.key: pick(task, chosen[task.key], lookup, weigh) for task in several}
    return {key: choice for key, choice in found.items() if choice}


def pick(task: Task, chosen: Choice, lookup: Lookup, weigh: str) -> Choice | None:
    if chosen != task.default:
        return chosen
    default = task.schedule(task.default)
    expected = version_of(default, default, task.make)
    assert expected
    for records in lookup.measured(task.op.name, task.sizes):
        known = current(task, records, expected)
        versions = {record.choice: record.version for record in known}
        for choice in recall(task, known, weigh).quickest():
            schedule = task.schedule(choice)
            if choice != task.default and versions[choice] == version_of(
                default, schedule, task.make
            ):
                return choice
    return None


def build(
    builder: Builder, choice: Choice, built: Mapping[Choice, Candidate | str]
) -> Candidate | str:
    """A candidate, one of `built` where that is the same kernel, or why there is none."""
    try:
        if made := builder.build(choice):
            return made
        name = builder.version_of(choice)
    except (RuntimeError, ValueError) as error:  # TVM's code generator, the linker, the factory
        return f"not built: {' '.join(str(error).split())[:200]}"
    same = (c for c in built.values() if isinstance(c, Candidate) and c.version == name)
    return next(same, "not possible for this shape")


def table(rows: Sequence["Row"], weigh: str) -> list[str]:
    """A line a shape and pick, and how many of those from other shapes gain and lose."""
    names = [row.task.op.name for row in rows]
    rows = [row for row in rows if names.count(row.task.op.name) > 1]
    if not rows:
        return ["One shape an op: nothing to transfer."]
    if not any(row.moved for row in rows):
        return [
            f"Nothing besides the defaults was measured of these kernels for `--weigh {weigh}`: "
            "nothing to transfer. `python -m compiler.tune` measures other choices."
        ]
    lines, counts = [], {"quicker": 0, "slower": 0, "neither": 0, "not run": 0}
    for row in rows:
        for shape, moved in row.moved.items():
            cells, verdict = judge(row, moved, weigh)
            is_own = shape == row.task.shape
            counts[verdict] += not is_own
            whose = "itself" if is_own else shape
            what = " | ".join([row.task.op.name, row.task.shape, whose, describe(moved.choice)])
            lines.append(f"| {what} | {cells} |")
    return [
        "Each shape's choice, or, where that is the default, the quickest besides it that was "
        "measured, on its own shape and on the op's others, against the default there. "
        f"Of {sum(counts.values())} choices moved to another shape: "
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        + ".",
        "",
        "| op | run on | best for | choice | against the default here | 99 % interval |",
        "|---|---|---|---|---|---|",
        *lines,
    ]


def judge(row: "Row", moved: Moved, weigh: str) -> tuple[str, str]:
    """(two cells, the verdict) of a pick against the default of the shape that it ran on."""
    if isinstance(moved.found, str):
        return f"{moved.found} |", "not run"
    default, costs = (row.task.costs(times, weigh) for times in (row.default, moved.found))
    of, back = gain(default, costs), gain(costs, default)
    verdict = "quicker" if of.is_real else "slower" if back.is_real else "neither"
    return f"{of} | {of.low:.2f} to {of.high:.2f}", verdict
