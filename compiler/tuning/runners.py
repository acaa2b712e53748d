"""Runners: the workers of a session, with one task before all of them; checks and races on them."""

from collections.abc import Callable, Sequence

from compiler.tuning.candidates import Candidate
from compiler.tuning.pool import NotStarted, RunError, Worker, spread
from compiler.tuning.tasks import Task, Times

CHECK_LIMIT, RACE_LIMIT = 30.0, 120.0  # seconds until a candidate counts as hanging
ROUND_SECONDS = 6.0  # of a race; slow kernels get fewer rounds


class Runners:
    """`weigh` says which numbers of rows are timed; the limits are seconds."""

    def __init__(
        self, workers: Sequence[Worker], weigh: str, check_limit: float, race_limit: float
    ) -> None:
        self.lost: list[str] = []  # workers that could not be started any more, a line each
        self._workers, self._weigh = list(workers), weigh
        self._check_limit, self._race_limit = check_limit, race_limit
        self._rows: list[int] = []

    def take_up(self, task: Task, files: dict) -> None:
        """Every worker's task from now on; to be repeated when `files` gain weights."""
        self._rows = list(task.rows(self._weigh))
        for worker in self._workers:
            try:
                worker.set_task(files)
            except RunError:  # started anew, with the task, when it is next asked for something
                worker.close()

    def check(self, candidates: Sequence[Candidate]) -> list[str]:
        """store.OK of each, or what is wrong with its results."""
        return self._going_on(
            lambda workers: spread(
                workers, candidates, lambda w, share: [self._check(w, c) for c in share]
            )
        )

    def race(
        self, candidates: Sequence[Candidate], rounds: int, seconds: float = ROUND_SECONDS
    ) -> list[Times]:
        """Times of each, interleaved, on one worker; RunError where one of them does not run."""
        return self._going_on(lambda workers: self._race(workers[0], candidates, rounds, seconds))

    def compare(
        self, default: Candidate, candidates: Sequence[Candidate], rounds: int
    ) -> list[tuple[Times, Times] | str]:
        """(times, the default's in the same rounds) of each, or how it failed after all."""

        def on(worker: Worker, share: list[Candidate]) -> list[tuple[Times, Times] | str]:
            if not share:
                return []
            try:
                base, *found = self._race(worker, [default, *share], rounds, ROUND_SECONDS)
            except RunError as error:
                if len(share) == 1:
                    return [str(error)]
                return [on(worker, [one])[0] for one in share]
            return [(times, base) for times in found]

        return self._going_on(lambda workers: spread(workers, candidates, on))

    def _going_on(self, work: Callable[[Sequence[Worker]], list]) -> list:
        """work(workers), without those that cannot be started as long as one is left."""
        while True:
            try:
                return work(self._workers)
            except NotStarted as error:
                if len(self._workers) == 1:
                    raise
                self._workers.remove(error.worker)
                self.lost.append(str(error))

    def _check(self, worker: Worker, candidate: Candidate) -> str:
        try:
            return worker.check(candidate.library, candidate.layout, self._check_limit)
        except RunError as error:
            return str(error)

    def _race(
        self, worker: Worker, candidates: Sequence[Candidate], rounds: int, seconds: float
    ) -> list[Times]:
        libraries = [(candidate.library, candidate.layout) for candidate in candidates]
        limit = self._race_limit + seconds
        return [*worker.race(libraries, self._rows, rounds, seconds, limit)]
