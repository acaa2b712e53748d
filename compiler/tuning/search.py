"""Search: which points of a space to measure next.

A space is small enough to list, so every point left is scored by MetaSchedule's XGBoost model and
the best are measured, with some at random beside them; the first batch has the default of every
family. Features are the family, the logarithms of the knobs' values and of the sizes: the model is
one for all tasks, so that a later task begins with what earlier ones taught.
"""

import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms

from compiler.config import BuildError
from compiler.kernels import Choice, families_of, knobs_of
from compiler.tuning import space
from compiler.tuning.tasks import Task

RANDOM_SHARE = 0.25  # of a batch
WARM_UP = 12  # measurements before predictions count
MISSING = -1.0  # the feature of a knob that a family does not have
NOT_RUN = 1e10  # the cost of a candidate that failed
MAX_SCORED = 2000  # points, at random where there are more


class Features:
    """Vectors of the same length for all tasks of a run."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        places = [
            (task.folder, family)
            for task in tasks
            for family in families_of(task.folder, task.target.families)
        ]
        self._families = sorted({family for _, family in places})
        self._knobs = sorted({name for place in places for name in knobs_of(*place)})
        self._sizes = sorted({name for task in tasks for name in task.sizes})
        self._ops = sorted({task.op.name for task in tasks})

    def vector(self, task: Task, choice: Choice) -> np.ndarray:
        knobs, sizes = dict(choice.knobs), dict(task.sizes)
        values = [
            *(float(task.op.name == op) for op in self._ops),
            *(float(choice.family == family) for family in self._families),
            *(math.log2(1 + knobs[k]) if k in knobs else MISSING for k in self._knobs),
            *(math.log2(1 + sizes[k]) if k in sizes else MISSING for k in self._sizes),
            task.active,
        ]
        return np.array([values], np.float32)


def make_model(tasks: Sequence[Task]) -> ms.cost_model.XGBModel:
    """MetaSchedule's, over our features. BuildError where xgboost is not installed."""
    try:
        import xgboost  # noqa: F401
    except ImportError as error:
        raise BuildError(f"tune: {error}; possible: pip install 'bitnet-compiler[tune]'") from error
    features = Features(tasks)
    by_workload = {workload_key(task): task for task in tasks}

    @derived_object
    class Extractor(ms.feature_extractor.PyFeatureExtractor):
        def extract_from(self, context, candidates):
            task = by_workload[context.task_name]
            vectors = (features.vector(task, space.choice_in(c.sch.mod)) for c in candidates)
            return [tvm.runtime.tensor(vector) for vector in vectors]

    return ms.cost_model.XGBModel(
        extractor=Extractor(),
        config=ms.cost_model.xgb_model.XGBConfig(nthread=1),  # more only wait for each other
        num_warmup_samples=WARM_UP,
        early_stopping_rounds=10,
        adaptive_training=False,
    )


@contextmanager
def without_tensor_intrinsics() -> Iterator[None]:
    """TuneContext imports TVM's intrinsics, 41 s of CPU, of which our templates use none."""
    name = "tvm.s_tir.tensor_intrin"
    before = sys.modules.get(name)
    sys.modules[name] = before or ModuleType(name)
    try:
        yield
    finally:
        if before is None:
            del sys.modules[name]


def workload_key(task: Task) -> str:
    return f"{task.op.name} {task.shape}"


class Search:
    """Proposes points of one task's space and learns how they did."""

    def __init__(self, task: Task, model: ms.cost_model.XGBModel, seed: int) -> None:
        self._task, self._model = task, model
        self._random = random.Random(seed)
        self._module = space.workload(task.op.name, task.sizes, task.target)
        with without_tensor_intrinsics():
            self._context = ms.TuneContext(
                self._module,
                target=task.target.to_tvm(),
                space_generator=space.design_spaces(task.folder, task.target),
                task_name=workload_key(task),
                num_threads=1,
            )
        self._left = list(space.points(task.folder, task.target))
        self._random.shuffle(self._left)
        self._candidates: dict[Choice, ms.MeasureCandidate] = {}
        self._is_first = True

    @property
    def left(self) -> int:
        return len(self._left)

    def propose(self, count: int) -> list[Choice]:
        """Points not proposed before, none where all were."""
        if len(self._left) <= count:
            return self._take(list(self._left))
        if self._is_first:
            self._is_first = False
            return self._take((self._family_defaults() + self._left)[:count])
        some = self._left[:MAX_SCORED]
        scores = self._model.predict(self._context, [self._candidate(c) for c in some])
        ranked = [some[i] for i in np.argsort(-scores, kind="stable")]
        best = ranked[: count - int(RANDOM_SHARE * count)]
        others = self._random.sample(ranked[len(best) :], count - len(best))
        return self._take(best + others)

    def skip(self, choices: Iterable[Choice]) -> None:
        """Points that need not be proposed."""
        self._take([choice for choice in set(choices) if choice in set(self._left)])

    def learn(self, measured: Sequence[tuple[Choice, float | None]]) -> None:
        """(point, its time as a share of the default's; None where it failed)"""
        if not measured:
            return
        candidates = [self._candidate(choice) for choice, _ in measured]
        results = [
            ms.runner.RunnerResult([NOT_RUN if cost is None else cost], None)
            for _, cost in measured
        ]
        self._model.update(self._context, candidates, results)

    def _family_defaults(self) -> list[Choice]:
        """Those left of the points in which every knob of a family has its first value."""
        return [
            choice
            for choice in self._left
            if all(
                value == knobs_of(self._task.folder, choice.family)[name][0]
                for name, value in choice.knobs
            )
        ]

    def _take(self, choices: list[Choice]) -> list[Choice]:
        chosen = list(dict.fromkeys(choices))
        taken = set(chosen)
        self._left = [choice for choice in self._left if choice not in taken]
        return chosen

    def _candidate(self, choice: Choice) -> ms.MeasureCandidate:
        if choice not in self._candidates:
            schedule = space.schedule_of(self._module, self._task.folder, choice)
            self._candidates[choice] = ms.MeasureCandidate(schedule, [])
        return self._candidates[choice]
