"""Recall: what the records hold of a task, for a session that goes on where another stopped.

A record of the search carries its share, the candidate's time over the default's in the same
rounds: the seconds of two sessions do not compare, their shares do. Those of another mix, which
has other numbers of rows, do not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from compiler.kernels import Choice, is_possible
from compiler.tuning import store
from compiler.tuning.statistics import Gain, gain
from compiler.tuning.store import Record
from compiler.tuning.tasks import Task


@dataclass(frozen=True)
class Recalled:
    shares: dict[Choice, float]  # measured: time as a share of the default's
    failed: set[Choice]
    chosen: Choice | None = None  # by the last final race
    result: Gain | None = None
    raced: dict[Choice, float] = field(default_factory=dict)  # in it, as `shares`

    def quickest(self) -> list[Choice]:
        """What ran, by the last race, then by the search."""
        raced = sorted(self.raced, key=lambda choice: self.raced[choice])
        rest = self.shares.keys() - self.raced.keys()
        return raced + sorted(rest, key=lambda choice: self.shares[choice])


def current(task: Task, records: Sequence[Record], version: str) -> list[Record]:
    """The task's, of the default that `version` begins with, and of knobs that are there still."""
    default = version.split("-")[0]
    return [
        record
        for record in records
        if record.key == task.key
        and record.version.startswith(default)
        and is_possible(record.choice, task.folder, task.target.families)
    ]


def recall(task: Task, known: Sequence[Record], weigh: str) -> Recalled:
    """Of `current` records."""
    rows = set(task.rows(weigh))
    searched: dict[Choice, set[int]] = {}
    for record in known:
        if record.share is not None and not record.race:
            searched.setdefault(record.choice, set()).add(record.rows)
    shares = {
        r.choice: r.share
        for r in known
        if r.share is not None and not r.race and searched[r.choice] == rows
    }
    failed = {r.choice for r in known if r.result != store.OK}
    last = max((r.race for r in known if r.chosen), default=0)
    race: dict[Choice, dict[int, Sequence[float]]] = {}  # seconds by rows
    for record in known:
        if last and record.race == last:
            race.setdefault(record.choice, {})[record.rows] = record.seconds
    if task.default not in race or any(times.keys() != rows for times in race.values()):
        return Recalled(shares, failed)
    chosen = next(r.choice for r in known if r.chosen and r.race == last)
    costs = {choice: task.costs(times, weigh) for choice, times in race.items()}
    default = costs[task.default]
    raced = {choice: median(found) / median(default) for choice, found in costs.items()}
    return Recalled(shares, failed, chosen, gain(default, costs[chosen]), raced)
