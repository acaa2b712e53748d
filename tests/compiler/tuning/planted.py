"""int8_matmul with planted faults, a task of it, and a session that tunes it."""

from contextlib import ExitStack, contextmanager
from pathlib import Path

import tvm
from tvm.script import tirx as T

from compiler.ops import OPS
from compiler.signature import Match
from compiler.toolchain import find_linker
from compiler.tuning import session, store
from compiler.tuning.machine import Machine
from compiler.tuning.pool import Worker
from compiler.tuning.tasks import Task
from schedules.targets import TARGETS

TARGET = TARGETS["generic"]
HERE = Machine("CPU", (), 2, "0.27")
N, K = 32, 24
NONE, CRASH, HANG, WRONG, NO_BUILD = range(5)


def planted(n, k, target, *, fault=NONE, lanes=1):
    """int8_matmul, `lanes` times as much work; a fault where it is asked for."""
    if lanes == 3:
        raise ValueError("int8_matmul: lanes is 3")
    if fault == NO_BUILD:
        raise RuntimeError("cannot select an instruction")
    stop = {CRASH: "abort", HANG: "pause"}.get(fault)
    stops, extra = int(stop is not None), int(fault == WRONG)
    name = stop or "pause"
    rows = tvm.tirx.Var("M", "int64")

    @T.prim_func(s_tir=True)
    def int8_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((n, k), "int8"),
        w_scale: T.Buffer((n,), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            for _ in T.serial(stops):
                T.evaluate(T.call_extern("int32", name))
            for _, m, j in T.grid(lanes, rows, n):
                acc = T.int32(0)
                for i in T.serial(k):
                    acc += T.cast(q[m, i], "int32") * T.cast(w[j, i], "int32")
                out[m, j] = T.cast(acc + extra, "float32") * (scale[m] * w_scale[j])

    return int8_matmul


def make_task(n: int = N) -> Task:
    op, match = OPS["int8_matmul"], Match("int8_matmul")
    for letter, size in {"N": n, "K": K}.items():
        match.bind(letter, size, "w")
    make = op.maker(match, {}, TARGET)
    return Task(op, op.sizes(match, {}), {}, make, TARGET, calls={1: [1, 0], 128: [0, 1]})


def settings(**changes) -> session.Settings:
    values = {"trials": 15, "weigh": "both", "cold_bytes": 2**16, "linker": find_linker(TARGET)}
    limits = {"check_limit": 3.0, "rounds": 5, "final_rounds": 15}
    return session.Settings(**values | limits | changes)


@contextmanager
def one_worker():
    worker = Worker(TARGET, 2)
    try:
        yield worker
    finally:
        worker.close()


def tuned(root: Path, say=None, workers=None, tasks=None, **changes) -> session.Session:
    """A session, run to its end; `say` sees it at every step."""
    with ExitStack() as stack:
        workers = workers or [stack.enter_context(one_worker())]
        writer = store.Writer(root, TARGET.name, HERE)
        running = session.Session(tasks or [make_task()], workers, writer, settings(**changes))
        if say:
            running.say = lambda: say(running)
        running.run()
    return running


def results(records) -> dict[tuple[int, int], set[str]]:
    found: dict[tuple[int, int], set[str]] = {}
    for record in records:
        knobs = dict(record.choice.knobs)
        key = knobs["fault"], knobs["lanes"]
        found.setdefault(key, set()).add(record.result)
    return found
