"""Session: tune the tasks of a model, one after another, the heaviest first.

    for task:                        measure the default; its time in the mix is the task's weight
    trials and minutes are shared out by weight, no more trials than a space has points
    for task, by weight:
        batches:                     propose, build, check against the reference, race, record
        final:                       the FINALISTS and the default, FINAL_ROUNDS interleaved rounds;
                                     chosen is what beats the default outside of the noise, else it

A batch races with the default in it, and a candidate's cost is its time as a share of the default's
in the same rounds, so that batches compare though the machine's speed drifts. Every result is on
the disk before the next batch begins.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tvm.s_tir import meta_schedule as ms

from compiler.config import BuildError
from compiler.kernels import Choice
from compiler.tuning import space, store
from compiler.tuning.candidates import Builder, Candidate
from compiler.tuning.case_files import add_weights, make_files
from compiler.tuning.pool import RunError, Worker, spread
from compiler.tuning.recall import current, recall
from compiler.tuning.search import Search, make_model
from compiler.tuning.statistics import Gain, gain
from compiler.tuning.tasks import Task, Times, allot

BATCH = 8
ROUNDS, FINAL_ROUNDS = 9, 41
ROUND_SECONDS, FINAL_SECONDS = 6.0, 20.0  # of a race; slow kernels get fewer rounds
CHECK_LIMIT, RACE_LIMIT = 30.0, 120.0  # seconds until a candidate counts as hanging
FINALISTS = 3


@dataclass
class Progress:
    """What the table shows of a task."""

    task: Task
    share: float = 0.0  # of the tuned kernels' time
    trials: int = 0
    allotted: int = 0
    default: Times | None = None
    best: float = 1.0  # time as a share of the default's
    failed: int = 0
    state: str = "waiting"
    result: Gain | None = None
    chosen: Choice | None = None


@dataclass
class Settings:
    trials: int
    weigh: str
    cold_bytes: int
    linker: str
    resume: bool = False
    minutes: float = 20.0
    rounds: int = ROUNDS
    final_rounds: int = FINAL_ROUNDS
    check_limit: float = CHECK_LIMIT
    race_limit: float = RACE_LIMIT
    seed: int = 0


@dataclass
class Tuned:
    """A task under way."""

    progress: Progress
    builder: Builder
    files: dict
    search: Search
    default: Candidate
    cost: dict[Choice, float] = field(default_factory=dict)
    built: dict[Choice, Candidate] = field(default_factory=dict)


class Session:
    def __init__(
        self,
        tasks: Sequence[Task],
        workers: Sequence[Worker],
        writer: store.Writer,
        settings: Settings,
    ) -> None:
        self.say: Callable[[], None] = lambda: None  # called when the progress changes
        self.records = writer.path
        self.progress = [Progress(task) for task in tasks]
        self._ends = time.monotonic() + 60 * settings.minutes
        self._searching, self._made = 0.0, 0  # since when, and how many trials were made since
        self._workers, self._writer, self._settings = workers, writer, settings
        self._model = make_model(tasks)
        self._known = store.read(writer.path).records if settings.resume else ()

    def run(self) -> None:
        """All tasks; KeyboardInterrupt leaves what was measured in the records."""
        with tempfile.TemporaryDirectory(prefix="tune-") as scratch:
            under_way = []
            for i, progress in enumerate(self.progress):
                folder = Path(scratch) / str(i)
                folder.mkdir()
                under_way.append(self._begin(progress, folder))
            self._share_out(under_way)
            left, self._searching = 1.0, time.monotonic()
            for tuned in sorted(under_way, key=lambda t: t.progress.share, reverse=True):
                now = time.monotonic()
                self._tune(tuned, now + (self._ends - now) * tuned.progress.share / left)
                left = max(1e-9, left - tuned.progress.share)

    def seconds_left(self) -> float | None:
        """By the trials made so far, until the time is up at most; None before the first."""
        if not self._made:
            return None
        now = time.monotonic()
        left = sum(p.allotted - p.trials for p in self.progress if p.state != "done")
        return max(0.0, min((now - self._searching) / self._made * left, self._ends - now))

    def _show(self, progress: Progress, state: str) -> None:
        progress.state = state
        self.say()

    def _begin(self, progress: Progress, folder: Path) -> Tuned:
        """Inputs and the default, measured: what the task weighs."""
        task, settings = progress.task, self._settings
        self._show(progress, "preparing")
        builder = Builder(task, folder, settings.linker)
        files = make_files(task, folder, settings.weigh, settings.cold_bytes)
        default = builder.build(task.default)
        assert default
        add_weights(files, default)
        search = Search(task, self._model, settings.seed)
        search.skip([task.default])
        tuned = Tuned(progress, builder, files, search, default)
        self._set_task(tuned)
        result = self._check(self._workers[0], default)
        if result != store.OK:
            raise BuildError(
                f"tune: {task.op.name} {task.shape}: the default kernel itself fails ({result}); "
                "nothing can be tuned against it"
            )
        try:
            (progress.default,) = self._race(self._workers[0], tuned, [default], settings.rounds)
        except RunError as error:
            raise BuildError(
                f"tune: {task.op.name} {task.shape}: timing failed: {error}"
            ) from error
        self._show(progress, "waiting")
        return tuned

    def _share_out(self, under_way: Sequence[Tuned]) -> None:
        """Trials by the time that a task takes in the mix, at most as many as there are points."""
        weights = {}
        for tuned in under_way:
            progress = tuned.progress
            assert progress.default
            medians = {rows: median(times) for rows, times in progress.default.items()}
            weights[progress.task.key] = progress.task.seconds(medians, self._settings.weigh)
        total = sum(weights.values())
        for tuned in under_way:
            tuned.progress.share = weights[tuned.progress.task.key] / total
        room = {t.progress.task.key: t.search.left for t in under_way}
        shares = allot(self._settings.trials, weights, room)
        for tuned in under_way:
            tuned.progress.allotted = shares[tuned.progress.task.key]

    def _tune(self, tuned: Tuned, ends: float) -> None:
        """Search until the trials or the task's share of the time is used, then the final race."""
        progress = tuned.progress
        self._set_task(tuned)
        if self._settings.resume:
            self._resume(tuned)
        before = progress.trials
        while progress.trials < progress.allotted and time.monotonic() < ends:
            self._show(progress, "searching")
            batch = tuned.search.propose(min(BATCH, progress.allotted - progress.trials))
            if not batch:
                break
            self._measure(tuned, batch)
        if progress.chosen is None or progress.trials > before:
            self._show(progress, "final")
            self._final(tuned)
        self._show(progress, "done")

    def _measure(self, tuned: Tuned, batch: Sequence[Choice]) -> None:
        """Build, check, race and record a batch."""
        results: dict[Choice, str] = {}
        candidates = []
        for choice in batch:
            try:
                candidate = tuned.builder.build(choice)
            except (RuntimeError, BuildError) as error:  # TVM's code generator, the linker
                results[choice] = f"build: {' '.join(str(error).split())[:200]}"
                continue
            if candidate is None:  # not a point of the space after all
                tuned.progress.allotted = min(
                    tuned.progress.allotted,
                    tuned.progress.trials + len(batch) + tuned.search.left,
                )
                continue
            candidates.append(candidate)
        new = [add_weights(tuned.files, candidate) for candidate in candidates]
        if any(new):
            self._set_task(tuned)
        checked = spread(
            self._workers, candidates, lambda w, share: [self._check(w, c) for c in share]
        )
        results |= {c.choice: found for c, found in zip(candidates, checked, strict=True)}
        good = [c for c in candidates if results[c.choice] == store.OK]
        times = spread(self._workers, good, lambda w, share: self._compare(w, tuned, share))
        self._keep(tuned, results, dict(zip((c.choice for c in good), times, strict=True)))
        for candidate in candidates:
            tuned.built[candidate.choice] = candidate
        self._forget_losers(tuned)

    def _compare(
        self, worker: Worker, tuned: Tuned, candidates: list[Candidate]
    ) -> list[tuple[Times, Times] | str]:
        """(times, the default's in the same rounds) of each, or how it failed after all."""
        if not candidates:
            return []
        try:
            default, *found = self._race(
                worker, tuned, [tuned.default, *candidates], self._settings.rounds
            )
        except RunError as error:
            if len(candidates) == 1:
                return [str(error)]
            return [self._compare(worker, tuned, [one])[0] for one in candidates]
        return [(times, default) for times in found]

    def _keep(self, tuned: Tuned, results: dict[Choice, str], times: Mapping) -> None:
        """Write the batch's records, tell the search, count."""
        progress, learnt, records = tuned.progress, [], []
        for choice, result in results.items():
            found = times.get(choice)
            if isinstance(found, str):
                result, found = found, None
            own = None
            if found:
                own, default = found
                weigh = self._settings.weigh
                cost = median(progress.task.costs(own, weigh)) / median(
                    progress.task.costs(default, weigh)
                )
                tuned.cost[choice] = cost
                progress.best = min(progress.best, cost)
            else:
                progress.failed += 1
            learnt.append((choice, tuned.cost.get(choice)))
            share = tuned.cost.get(choice) if own else None
            records += self._records(tuned, choice, own, {"result": result}, share)
            progress.trials += 1
            self._made += 1
        self._writer.add(self._workload(tuned), records)
        tuned.search.learn(learnt)

    def _final(self, tuned: Tuned) -> None:
        """Race the best with the default and record which is to be used."""
        progress, task, weigh = tuned.progress, tuned.progress.task, self._settings.weigh
        finalists = self._finalists(tuned)
        self._set_task(tuned)
        try:
            times = self._race(
                self._workers[0], tuned, finalists, self._settings.final_rounds, FINAL_SECONDS
            )
        except RunError:  # of one that ran before: none of them is to be trusted
            finalists = finalists[:1]
            try:
                times = self._race(self._workers[0], tuned, finalists, self._settings.final_rounds)
            except RunError as error:
                raise BuildError(f"runner: {task.shape}: the default fails: {error}") from error
        totals = [task.costs(found, weigh) for found in times]
        gains = [gain(totals[0], total) for total in totals]
        winner = max(range(len(gains)), key=lambda i: (gains[i].is_real, gains[i].ratio))
        if not gains[winner].is_real:
            winner = 0
        race, records = int(time.time()), []
        for i, (candidate, found) in enumerate(zip(finalists, times, strict=True)):
            facts = {"race": race, "chosen": int(i == winner)}
            records += self._records(tuned, candidate.choice, found, facts)
        self._writer.add(self._workload(tuned), records)
        progress.chosen, progress.result = finalists[winner].choice, gains[winner]
        progress.default = times[0]

    def _finalists(self, tuned: Tuned) -> list[Candidate]:
        """The default and the best. One that an earlier session measured is checked anew: its code
        may be another by now."""
        found = [tuned.default]
        for choice in self._best(tuned):
            candidate = tuned.built.get(choice)
            if candidate is None:
                try:
                    candidate = tuned.builder.build(choice)
                except (RuntimeError, BuildError):
                    continue
                if candidate is None:
                    continue
                add_weights(tuned.files, candidate)
                self._set_task(tuned)
                if self._check(self._workers[0], candidate) != store.OK:
                    continue
            found.append(candidate)
        return found

    @staticmethod
    def _best(tuned: Tuned) -> list[Choice]:
        return sorted(tuned.cost, key=lambda choice: tuned.cost[choice])[:FINALISTS]

    def _resume(self, tuned: Tuned) -> None:
        """Take up what the records hold: what was measured, and what the last race chose."""
        progress, task = tuned.progress, tuned.progress.task
        known = current(task, self._known, tuned.default.version)
        found = recall(task, known, self._settings.weigh)
        tuned.cost |= found.shares
        learnt = [*found.shares.items(), *((choice, None) for choice in found.failed)]
        tuned.search.skip([choice for choice, _ in learnt])
        tuned.search.learn(learnt)
        progress.trials, progress.failed = len(learnt), len(found.failed)
        progress.best = min([1.0, *found.shares.values()])
        progress.chosen, progress.result = found.chosen, found.result

    def _records(
        self,
        tuned: Tuned,
        choice: Choice,
        times: Times | None,
        facts: dict,
        share: float | None = None,
    ) -> list:
        """MetaSchedule's records of one candidate, one a number of rows."""
        task, module = tuned.progress.task, tuned.builder.workload
        facts = {
            "op": task.op.name,
            "sizes": space.canonical(task.sizes),
            "version": tuned.builder.version_of(choice),
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
            for rows in task.rows(self._settings.weigh)
        ]

    def _workload(self, tuned: Tuned) -> list:
        return ms.database.Workload(tuned.builder.workload).as_json()

    def _forget_losers(self, tuned: Tuned) -> None:
        """Libraries of candidates that cannot be finalists any more."""
        best = self._best(tuned)
        for choice in [choice for choice in tuned.built if choice not in best]:
            tuned.built.pop(choice).library.unlink()

    def _set_task(self, tuned: Tuned) -> None:
        try:
            for worker in self._workers:
                worker.set_task(tuned.files)
        except RunError as error:
            raise BuildError(
                f"runner: cannot take up {tuned.progress.task.shape}: {error}"
            ) from error

    def _check(self, worker: Worker, candidate: Candidate) -> str:
        try:
            return worker.check(candidate.library, candidate.layout, self._settings.check_limit)
        except RunError as error:
            return str(error)

    def _race(
        self,
        worker: Worker,
        tuned: Tuned,
        candidates: Sequence[Candidate],
        rounds: int,
        seconds: float = ROUND_SECONDS,
    ) -> list[dict[int, list[float]]]:
        libraries = [(candidate.library, candidate.layout) for candidate in candidates]
        rows = tuned.progress.task.rows(self._settings.weigh)
        return worker.race(libraries, rows, rounds, seconds, self._settings.race_limit + seconds)
