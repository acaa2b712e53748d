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
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from compiler.config import BuildError
from compiler.kernels import Choice
from compiler.tuning import store
from compiler.tuning.candidates import Builder, Candidate
from compiler.tuning.case_files import add_weights, make_files
from compiler.tuning.pool import RunError, Worker
from compiler.tuning.runners import CHECK_LIMIT, RACE_LIMIT, Runners
from compiler.tuning.search import Search, make_model
from compiler.tuning.statistics import gain
from compiler.tuning.tasks import Task, allot
from compiler.tuning.under_way import DONE, NOT_TRIED, Progress, UnderWay

BATCH = 8
ROUNDS, FINAL_ROUNDS = 9, 41
FINAL_SECONDS = 20.0


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
        self._writer, self._settings = writer, settings
        limits = settings.check_limit, settings.race_limit
        self._runners = Runners(workers, settings.weigh, *limits)
        self._model = make_model(tasks)
        self._known = store.read(writer.path).records if settings.resume else ()
        self.takes_up = bool(self._known)  # whether --resume found anything

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
        left = sum(progress.left for progress in self.progress)
        return max(0.0, min((now - self._searching) / self._made * left, self._ends - now))

    @property
    def lost(self) -> list[str]:
        """Runners that could not be started any more, while others went on; a line each."""
        return self._runners.lost

    def _show(self, progress: Progress, state: str) -> None:
        progress.state = state
        self.say()

    def _begin(self, progress: Progress, folder: Path) -> UnderWay:
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
        self._runners.take_up(task, files)
        (result,) = self._runners.check([default])
        if result != store.OK:
            raise BuildError(
                f"tune: {task.op.name} {task.shape}: the default kernel itself fails ({result}); "
                "nothing can be tuned against it"
            )
        try:
            (progress.default,) = self._runners.race([default], settings.rounds)
        except RunError as error:
            raise BuildError(
                f"tune: {task.op.name} {task.shape}: timing failed: {error}"
            ) from error
        self._show(progress, "waiting")
        return UnderWay(progress, builder, files, search, default, settings.weigh)

    def _share_out(self, under_way: Sequence[UnderWay]) -> None:
        """Trials by the time that a task takes in the mix, at most as many as there are points."""
        weights = {}
        for tuned in under_way:
            default = tuned.progress.default
            assert default
            medians = {rows: median(times) for rows, times in default.items()}
            weights[tuned.task.key] = tuned.task.seconds(medians, self._settings.weigh)
        total = sum(weights.values())
        room = {tuned.task.key: tuned.search.left for tuned in under_way}
        shares = allot(self._settings.trials, weights, room)
        for tuned in under_way:
            tuned.progress.share = weights[tuned.task.key] / total
            tuned.progress.allotted = shares[tuned.task.key]

    def _tune(self, tuned: UnderWay, ends: float) -> None:
        """Search until the trials or the task's share of the time is used, then the final race."""
        progress = tuned.progress
        self._runners.take_up(tuned.task, tuned.files)
        if self._settings.resume:
            tuned.resume(self._known)
        before = progress.trials
        while progress.left and time.monotonic() < ends:
            self._show(progress, "searching")
            batch = tuned.search.propose(min(BATCH, progress.left))
            if not batch:
                break
            self._measure(tuned, batch)
        if not progress.trials and tuned.search.left:  # a race without a rival would prove nothing
            self._show(progress, NOT_TRIED)
            return
        if progress.chosen is None or progress.trials > before:
            self._show(progress, "final")
            self._final(tuned)
        self._show(progress, DONE)

    def _measure(self, tuned: UnderWay, batch: Sequence[Choice]) -> None:
        """Build, check, race and record a batch."""
        candidates, results = tuned.build(batch)
        self._show_weights(tuned, candidates)
        checked = self._runners.check(candidates)
        results |= {c.choice: found for c, found in zip(candidates, checked, strict=True)}
        good = [c for c in candidates if results[c.choice] == store.OK]
        times = self._runners.compare(tuned.default, good, self._settings.rounds)
        self._keep(tuned, results, dict(zip((c.choice for c in good), times, strict=True)))
        tuned.keep_best(candidates)

    def _show_weights(self, tuned: UnderWay, candidates: Sequence[Candidate]) -> None:
        """To the runners, where a candidate reads a layout that none did before."""
        if any([add_weights(tuned.files, candidate) for candidate in candidates]):
            self._runners.take_up(tuned.task, tuned.files)

    def _keep(self, tuned: UnderWay, results: dict[Choice, str], times: Mapping) -> None:
        """Write the batch's records, tell the search, count."""
        progress, learnt, records = tuned.progress, [], []
        for choice, result in results.items():
            found = times.get(choice)
            if isinstance(found, str):
                result, found = found, None
            own, share = None, None
            if found:
                own, default = found
                costs = [median(tuned.task.costs(seen, tuned.weigh)) for seen in (own, default)]
                share = tuned.cost[choice] = costs[0] / costs[1]
                progress.best = min(progress.best, share)
            else:
                progress.failed += 1
            learnt.append((choice, share))
            records += tuned.records(choice, own, {"result": result}, share)
            progress.trials += 1
            self._made += 1
        self._writer.add(tuned.workload(), records)
        tuned.search.learn(learnt)

    def _final(self, tuned: UnderWay) -> None:
        """Race the best with the default and record which is to be used."""
        progress, task, rounds = tuned.progress, tuned.task, self._settings.final_rounds
        finalists = self._finalists(tuned)
        try:
            times = self._runners.race(finalists, rounds, FINAL_SECONDS)
        except RunError:  # of one that ran before: none of them is to be trusted
            finalists = finalists[:1]
            try:
                times = self._runners.race(finalists, rounds)
            except RunError as error:
                raise BuildError(f"runner: {task.shape}: the default fails: {error}") from error
        totals = [task.costs(found, tuned.weigh) for found in times]
        gains = [gain(totals[0], total) for total in totals]
        winner = max(range(len(gains)), key=lambda i: (gains[i].is_real, gains[i].ratio))
        if not gains[winner].is_real:
            winner = 0
        race, records = int(time.time()), []
        for i, (candidate, found) in enumerate(zip(finalists, times, strict=True)):
            facts = {"race": race, "chosen": int(i == winner)}
            records += tuned.records(candidate.choice, found, facts)
        self._writer.add(tuned.workload(), records)
        progress.chosen, progress.result = finalists[winner].choice, gains[winner]
        progress.default = times[0]

    def _finalists(self, tuned: UnderWay) -> list[Candidate]:
        """The default and the best. One that an earlier session measured is checked anew: its code
        may be another by now."""
        best = tuned.best()
        again, _ = tuned.build([choice for choice in best if choice not in tuned.built])
        self._show_weights(tuned, again)
        checked = zip(again, self._runners.check(again), strict=True)
        ready = tuned.built | {c.choice: c for c, found in checked if found == store.OK}
        return [tuned.default, *(ready[choice] for choice in best if choice in ready)]
