"""Transfer: whether what is quick for one shape is so for another of the same op.

A shape's pick is what a build takes for it; where that is the default, the quickest besides it of
the last race, else of the search, whether or not it gained: where every default stays, the picks
still tell whether choices transfer. A report races each pick on every shape of its op, in the same
rounds as that shape's default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compiler.kernels import Choice, version_of
from compiler.tuning.candidates import Builder, Candidate
from compiler.tuning.lookup import Lookup
from compiler.tuning.recall import current, recall
from compiler.tuning.tasks import Task, Times


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
    expected = version_of(default, default, task.make, task.target.families)
    assert expected
    for records in lookup.measured(task.op.name, task.sizes):
        known = current(task, records, expected)
        versions = {record.choice: record.version for record in known}
        for choice in recall(task, known, weigh).quickest():
            schedule = task.schedule(choice)
            if choice != task.default and versions[choice] == version_of(
                default, schedule, task.make, task.target.families
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
