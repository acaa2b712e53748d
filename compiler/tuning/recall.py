"""Recall: what the records hold of a task, for a session that goes on where another stopped.

A record of the search carries its share, the candidate's time over the default's in the same
rounds: the seconds of two sessions do not compare, their shares do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from compiler.kernels import Choice
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


def recall(task: Task, known: Sequence[Record], weigh: str) -> Recalled:
    """Of the task's records, of this version of its kernels."""
    shares = {r.choice: r.share for r in known if r.share is not None and not r.race}
    failed = {r.choice for r in known if r.result != store.OK}
    last = max((r.race for r in known if r.chosen), default=0)
    race: dict[Choice, dict[int, Sequence[float]]] = {}  # seconds by rows
    for record in known:
        if last and record.race == last:
            race.setdefault(record.choice, {})[record.rows] = record.seconds
    rows = set(task.rows(weigh))
    if not race or any(rows - times.keys() for times in race.values()):
        return Recalled(shares, failed)
    chosen = next(r.choice for r in known if r.chosen and r.race == last)
    default, winner = (task.costs(race[choice], weigh) for choice in (task.default, chosen))
    return Recalled(shares, failed, chosen, gain(default, winner))
