"""UnderWay: a task that is being tuned, what was built and measured of it, and its records."""

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tvm.s_tir import meta_schedule as ms

from compiler.config import BuildError
from compiler.kernels import Choice
from compiler.tuning import space, store
from compiler.tuning.candidates import Builder, Candidate
from compiler.tuning.recall import current, recall
from compiler.tuning.search import Search
from compiler.tuning.statistics import Gain
from compiler.tuning.store import Record
from compiler.tuning.tasks import Task, Times

FINALISTS = 3
ROOM = 2**24  # bytes; a library has some 100 KB, a linker's files beside it a few times that

DONE, NOT_TRIED = "done", "not tried"


@dataclass
class Progress:
    """What the table shows of a task."""

    task: Task
    share: float = 0.0  # of the tuned kernels' time
    trials: int = 0
    allotted: int | None = None  # None: not shared out yet
    default: Times | None = None
    best: float = 1.0  # time as a share of the default's
    failed: int = 0
    state: str = "waiting"
    result: Gain | None = None
    chosen: Choice | None = None

    @property
    def left(self) -> int:
        """Trials that are still to be made."""
        return 0 if self.is_over else max(0, (self.allotted or 0) - self.trials)

    @property
    def is_over(self) -> bool:
        return self.state in (DONE, NOT_TRIED)


@dataclass
class UnderWay:
    progress: Progress
    builder: Builder
    files: dict
    search: Search
    default: Candidate
    weigh: str
    cost: dict[Choice, float] = field(default_factory=dict)
    built: dict[Choice, Candidate] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        return self.progress.task

    def resume(self, known: Sequence[Record]) -> None:
        """Take up what the records hold: what was measured, and what the last race chose."""
        progress = self.progress
        found = recall(self.task, current(self.task, known, self.default.version), self.weigh)
        self.cost |= found.shares
        learnt = [*found.shares.items(), *((choice, None) for choice in found.failed)]
        self.search.skip([choice for choice, _ in learnt])
        self.search.learn(learnt)
        progress.trials, progress.failed = len(learnt), len(found.failed)
        progress.best = min([1.0, *found.shares.values()])
        progress.chosen, progress.result = found.chosen, found.result

    def build(self, batch: Sequence[Choice]) -> tuple[list[Candidate], dict[Choice, str]]:
        """(what can be run, how the others failed); what is no point of the space is neither."""
        candidates, failed = [], {}
        for choice in batch:
            try:
                candidate = self.builder.build(choice)
            except (RuntimeError, BuildError) as error:  # TVM's code generator, the linker
                require_room(self.builder.directory, error)
                failed[choice] = f"build: {' '.join(str(error).split())[:200]}"
                continue
            if candidate is None:
                room = self.progress.trials + len(batch) + self.search.left
                self.progress.allotted = min(self.progress.allotted or 0, room)
                continue
            candidates.append(candidate)
        return candidates, failed

    def best(self) -> list[Choice]:
        return sorted(self.cost, key=lambda choice: self.cost[choice])[:FINALISTS]

    def keep_best(self, candidates: Sequence[Candidate]) -> None:
        """Libraries of those that can be finalists still; the others' files go."""
        self.built |= {candidate.choice: candidate for candidate in candidates}
        best = self.best()
        for choice in [choice for choice in self.built if choice not in best]:
            self.built.pop(choice).library.unlink()

    def records(
        self, choice: Choice, times: Times | None, facts: dict, share: float | None = None
    ) -> list:
        """MetaSchedule's records of one candidate, one a number of rows."""
        task, module = self.task, self.builder.workload
        facts = {
            "op": task.op.name,
            "sizes": space.canonical(task.sizes),
            "version": self.builder.version_of(choice),
            "result": store.OK,
            "race": 0,
            "chosen": 0,
            "share": f"{share:.4f}" if share else "",
        } | facts
        schedule = space.schedule_of(module, task.folder, choice)
        space.annotate(schedule, facts)
        workload = ms.database.Workload(module)
        return [
            ms.database.TuningRecord(
                schedule.trace,
                workload,
                list(times[rows]) if times else [store.FAILED_SECONDS],
                task.target.to_tvm(),
                [ms.arg_info.TensorInfo("int8", [rows, int(task.sizes["K"])])],
            ).as_json()
            for rows in task.rows(self.weigh)
        ]

    def workload(self) -> list:
        return ms.database.Workload(self.builder.workload).as_json()


def require_room(directory: Path, error: Exception) -> None:
    """BuildError where a full disk or quota, and no candidate, is to blame for the error."""
    if shutil.disk_usage(directory).free < ROOM or os.strerror(errno.EDQUOT) in str(error):
        raise BuildError(
            f"tune: {directory} has no room for candidates; what is measured is kept; possible: "
            "TMPDIR on a disk with room, then --resume"
        )
