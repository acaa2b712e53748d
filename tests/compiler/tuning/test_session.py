"""Tuning for real, of a small kernel with planted faults: what is recorded, chosen, resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tvm
from tvm.s_tir import meta_schedule as ms
from tvm.script import tirx as T

from compiler.config import BuildError
from compiler.kernels import Choice, KernelTable
from compiler.ops import OPS
from compiler.signature import Match
from compiler.toolchain import find_linker
from compiler.tuning import live, page, report, session, space, store
from compiler.tuning.candidates import Builder
from compiler.tuning.lookup import Lookup
from compiler.tuning.machine import Machine
from compiler.tuning.pool import NotStarted, Rpc, RunError, Worker, count_servers
from compiler.tuning.runners import Runners
from compiler.tuning.tasks import Task
from compiler.tuning.under_way import Progress
from schedules.int8_matmul import generic
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


@pytest.fixture
def kernel(monkeypatch):
    """The planted kernel in the place of generic's; its default is the slowest."""
    monkeypatch.setattr(generic, "kernel", planted)
    monkeypatch.setattr(
        generic,
        "KNOBS",
        {"fault": (NONE, CRASH, HANG, WRONG, NO_BUILD), "lanes": (400, 3, 1)},
        raising=False,
    )


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


def test_faults_are_recorded_as_such_and_the_fastest_is_chosen(kernel, tmp_path):
    running = tuned(tmp_path)
    directory = store.read(running.records)
    found = results(directory.records)
    for lanes in (400, 1):
        (wrong,), (crash,), (hang,) = (found[f, lanes] for f in (WRONG, CRASH, HANG))
        assert wrong.startswith("wrong: M=1: ") and crash == "crash: SIGABRT"
        assert hang == "hang: no answer in 3 s"
        assert found[NO_BUILD, lanes] == {"build: cannot select an instruction"}
    assert (NONE, 3) not in found, "a choice that the factory refuses is no candidate"
    best = Choice("generic", (("fault", NONE), ("lanes", 1)))
    assert [r.choice for r in directory.records if r.chosen] == [best, best]
    assert running.progress[0].result.is_real and running.progress[0].failed == 8
    check_build_takes_it(tmp_path, best)
    check_metaschedule_reads_it(running.records, best)
    check_resuming_measures_nothing(tmp_path, directory)


def check_build_takes_it(root: Path, best: Choice) -> None:
    task = make_task()
    table = KernelTable(TARGET, Lookup(TARGET, [root], HERE))
    assert table.choose("int8_matmul", "int8_matmul", task.sizes, task.make).choice == best
    assert table.origin("int8_matmul", task.sizes) == "record"


def check_metaschedule_reads_it(path: Path, best: Choice) -> None:
    """Its own database opens both files, ranks what ran first, and its traces replay."""
    database = ms.database.JSONDatabase(str(path / store.WORKLOADS), str(path / store.RECORDS))
    workload = space.workload("int8_matmul", make_task().sizes, TARGET)
    assert database.has_workload(workload)
    (top,) = database.get_top_k(database.commit_workload(workload), 1)
    replayed = top.as_measure_candidate().sch.mod
    assert space.choice_in(replayed) == best


def check_resuming_measures_nothing(root: Path, before: store.Directory) -> None:
    running = tuned(root, resume=True)
    assert store.read(running.records).records == before.records
    assert running.progress[0].state == "done" and running.progress[0].result.is_real


def test_interrupted_and_resumed(kernel, tmp_path, monkeypatch):
    """Ctrl-C after the first batch: its records stay, and are not measured again."""
    monkeypatch.setattr(session, "BATCH", 2)
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (100, 60, 30, 10, 1)})

    def interrupt(running):
        if running.progress[0].trials:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, interrupt)
    (path,) = store.find_directories(tmp_path)
    first = store.read(path).records
    assert len({record.choice for record in first}) == 2 and not any(r.race for r in first)
    assert not list(Lookup(TARGET, [tmp_path], HERE)("int8_matmul", make_task().sizes))
    running = tuned(tmp_path, resume=True)
    searched = [r for r in store.read(path).records if not r.race and r.rows == 1]
    assert len(searched) == len({record.choice for record in searched}) == 4
    assert running.progress[0].trials == 4
    assert dict(running.progress[0].chosen.knobs) == {"lanes": 1}


def test_resumed_kernels_that_changed_are_checked_anew(kernel, tmp_path, monkeypatch):
    """Only the default's code is that of the first session: the quickest is wrong by now."""
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (400, 60, 1)})
    assert dict(tuned(tmp_path).progress[0].chosen.knobs) == {"lanes": 1}
    (path,) = store.find_directories(tmp_path)
    before = store.read(path)
    store.write(replace(before, records=tuple(r for r in before.records if not r.race)), path)

    def changed(n, k, target, *, lanes=1):
        return planted(n, k, target, fault=NONE if lanes == 400 else WRONG, lanes=lanes)

    monkeypatch.setattr(generic, "kernel", changed)
    assert dict(tuned(tmp_path, resume=True).progress[0].chosen.knobs) == {"lanes": 400}


def test_resumed_with_another_knob_begins_anew(kernel, tmp_path, monkeypatch):
    """The default's code is the same, but the recorded choices are no points of the space."""
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (60, 1)})
    tuned(tmp_path)
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (60, 1), "fault": (NONE,)})
    running = tuned(tmp_path, resume=True)
    assert running.progress[0].trials == 1
    assert dict(running.progress[0].chosen.knobs) == {"lanes": 1, "fault": NONE}


def test_default_that_is_the_best_stays(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (1, 400)})
    running = tuned(tmp_path)
    assert dict(running.progress[0].chosen.knobs) == {"lanes": 1}
    assert not running.progress[0].result.is_real
    (recorded,) = Lookup(TARGET, [tmp_path], HERE)("int8_matmul", make_task().sizes)
    assert dict(recorded.choice.knobs) == {"lanes": 1}


def test_time_left(kernel, tmp_path, monkeypatch):
    """None before a trial is made, not by those of an earlier session, never above the minutes."""
    monkeypatch.setattr(session, "BATCH", 1)
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (60, 30, 10, 1)})
    tuned(tmp_path, trials=1)
    seen: dict[int, float | None] = {}

    def look(running):
        (progress,) = running.progress
        allotted, progress.allotted = progress.allotted, 10**6
        seen.setdefault(progress.trials, running.seconds_left())
        progress.allotted = allotted

    tuned(tmp_path, look, trials=3, resume=True, minutes=0.5)
    assert seen[0] is seen[1] is None and 0 < seen[2] <= 30


def test_time_is_up(kernel, tmp_path, monkeypatch):
    """No candidate is tried after it, and of a kernel that none was of, nothing is chosen."""
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (2, 1)})
    running = tuned(tmp_path, minutes=1e-6)
    assert running.progress[0].trials == 0 and running.progress[0].state == "not tried"
    assert store.read(running.records).records == () and running.progress[0].chosen is None
    (again,) = tuned(tmp_path, resume=True).progress
    assert again.trials == 1 and again.state == "done" and again.chosen is not None


def test_default_that_fails_is_refused(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(generic, "KNOBS", {"fault": (WRONG, NONE)})
    with pytest.raises(BuildError, match=r"the default kernel itself fails \(wrong: M=1"):
        tuned(tmp_path)


def test_report(kernel, tmp_path, monkeypatch):
    """Default against tuned in one table, with TVM's own; a plot; a gain that is there."""
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (400, 1)})
    tuned(tmp_path / "records", trials=2)
    rows, text = reported(tmp_path, [make_task()])
    assert rows[0].gain("both").low > 1
    assert "| int8_matmul | N=32 K=24 | 1 |" in text and "| record |" in text
    assert "One shape an op: nothing to transfer." in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    kernels = json.loads((tmp_path / "out" / "report.json").read_text())["kernels"]
    assert kernels[0]["seconds"].keys() == {"tvm", "default", "tuned"}


def reported(folder: Path, tasks: list[Task]) -> tuple[list[report.Row], str]:
    """What a report finds by folder/records, and its page in folder/out."""
    with one_worker() as worker:
        lookup = Lookup(TARGET, [folder / "records"], HERE)
        at = report.Measuring(worker, find_linker(TARGET), 2**16, "both", lookup)
        rows = list(report.measure(tasks, at))
    return rows, page.write(folder / "out", "planted", rows, "both", None).read_text()


def test_report_moves_choices_where_every_default_stays(kernel, tmp_path, monkeypatch):
    """The quickest besides it of each shape, on the other: one is slower, one cannot be built."""

    def refusing(n, k, target, *, lanes=1):
        if n == 48 and lanes == 60:
            raise ValueError("no 60 lanes of 48")
        return planted(n, k, target, lanes=lanes)

    monkeypatch.setattr(generic, "kernel", refusing)
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (1, 400, 60)})
    tasks = [make_task(32), make_task(48)]
    tuned(tmp_path / "records", tasks=tasks, trials=4)
    rows, text = reported(tmp_path, tasks)
    assert [row.choice for row in rows] == [task.default for task in tasks]
    moved = [{shape: dict(m.choice.knobs) for shape, m in row.moved.items()} for row in rows]
    assert moved[0] == moved[1] == {"N=32 K=24": {"lanes": 60}, "N=48 K=24": {"lanes": 400}}
    assert "2 choices moved to another shape: 0 quicker, 1 slower, 0 neither, 1 not run." in text
    refused = "not built: no 60 lanes of 48"
    assert f"| N=48 K=24 | N=32 K=24 | generic lanes=60 | {refused} | |" in text
    assert "| N=32 K=24 | itself | generic lanes=60 | 0." in text
    bare = [replace(row, moved={}) for row in rows]
    text = page.write(tmp_path / "bare", "planted", bare, "both", None).read_text()
    assert "Nothing besides the defaults was measured" in text


def test_report_tells_what_hangs(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(generic, "KNOBS", {"fault": (CRASH, NONE)})
    with pytest.raises(BuildError, match=r"report: int8_matmul N=32 K=24 .*: crash: SIGABRT"):
        reported(tmp_path, [make_task()])


@pytest.mark.parametrize(
    "slowest, expected", [(1.2, "| 1.20x | 1.20 to 1.30 |"), (0.9, "| none |")]
)
def test_whole_models_gain_is_judged_too(slowest, expected):
    speeds = [100.0] * report.BENCH_TURNS
    tuned = [slowest * 100, 130.0, *[120.0] * (report.BENCH_TURNS - 2)]
    found = {
        build: [[{"test": "tg64", "tokens_per_second": speed}] for speed in of]
        for build, of in {"default": speeds, "tuned": tuned}.items()
    }
    assert expected in page.bench_table(found)[-1]


@pytest.fixture(scope="module")
def servers():
    """A tracker and two servers on the loopback, TVM's own: the tracker's port."""
    environment = os.environ | {"TVM_NUM_THREADS": "1", "TVM_USE_RUNTIME_LIB": "1"}
    children: list[subprocess.Popen] = []

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", *arguments]
        children.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return children[-1]

    try:
        tracker = start("tvm.exec.rpc_tracker", "--host", "127.0.0.1", "--port-end", "9299")
        port = next(line for line in tracker.stdout if "bind to" in line).split(":")[-1].strip()
        where = ["--host", "127.0.0.1", "--tracker", f"127.0.0.1:{port}", "--key", "pair"]
        for _ in range(2):
            start("tvm.exec.rpc_server", *where, "--port", "9300", "--port-end", "9399")
        deadline = time.monotonic() + 60
        while servers_known(int(port)) < 2:
            assert time.monotonic() < deadline, "no two servers in a minute"
            time.sleep(0.5)
        yield int(port)
    finally:
        for child in children:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def servers_known(port: int) -> int:
    try:
        return count_servers(Rpc("127.0.0.1", port, "pair"))
    except BuildError:
        return 0


def test_two_servers_measure_in_parallel(kernel, tmp_path, monkeypatch, servers):
    monkeypatch.setattr(generic, "KNOBS", {"fault": (NONE, WRONG), "lanes": (100, 60, 30, 1)})
    with pytest.raises(BuildError, match=r"no server of key 'one' at .*; possible: pair"):
        count_servers(Rpc("127.0.0.1", servers, "one"))
    workers = [Worker(TARGET, 1, Rpc("127.0.0.1", servers, "pair")) for _ in range(2)]
    asked: dict[int, int] = {}
    for i, worker in enumerate(workers):
        monkeypatch.setattr(worker, "check", counted(worker.check, asked, i))
    try:
        running = tuned(tmp_path, workers=workers)
    finally:
        for worker in workers:
            worker.close()
    assert min(asked.get(0, 0), asked.get(1, 0)) >= 3
    found = results(store.read(running.records).records)
    assert all(result.startswith("wrong") for r in (100, 60, 30, 1) for result in found[WRONG, r])
    assert dict(running.progress[0].chosen.knobs) == {"fault": NONE, "lanes": 1}


class Gone(Worker):
    """A server that is no more."""

    def _start(self) -> None:
        raise NotStarted("runner: rpc 127.0.0.1:1 key pair did not start", self)


def test_a_server_that_is_gone_is_left_out(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (100, 1)})
    with one_worker() as worker:
        running = tuned(tmp_path, workers=[Gone(TARGET, 1), worker])
    assert dict(running.progress[0].chosen.knobs) == {"lanes": 1}
    assert running.lost == ["runner: rpc 127.0.0.1:1 key pair did not start"]
    with pytest.raises(BuildError, match="did not start"):
        tuned(tmp_path / "alone", workers=[Gone(TARGET, 1)])


def test_a_server_that_ended_is_asked_for_anew(monkeypatch):
    """An error over RPC may be the server's end, and a task can be given later, too."""
    with one_worker() as worker:
        with pytest.raises(RunError, match="error"):
            worker.ask("nonsense", (), 60)
        assert worker._process is not None
        monkeypatch.setattr(worker, "_rpc", Rpc("127.0.0.1", 1, "pair"))
        with pytest.raises(RunError, match="error"):
            worker.ask("nonsense", (), 60)
        assert worker._process is None
        monkeypatch.setattr(worker, "_rpc", None)
        worker._start()
        Runners([worker], "both", 1.0, 1.0).take_up(make_task(), {"no": "task"})
        assert worker._process is None


def test_nothing_is_chosen_of_a_kernel_without_trials(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (100, 1)})
    running = tuned(tmp_path, tasks=[make_task(), make_task(2 * N)], trials=1)
    by_state = {progress.state: progress for progress in running.progress}
    assert by_state["done"].trials == 1 and by_state["not tried"].chosen is None
    assert len({record.key for record in store.read(running.records).records}) == 1


def test_trials_as_the_table_shows_them():
    """Open until they are shared out; a session that goes on may have had more than it allots."""
    progress = Progress(make_task())
    assert live.row(progress)[2:4] == ["", ""]
    progress.trials, progress.allotted, progress.share = 8, 4, 0.3
    assert live.row(progress)[2:4] == ["30 %", "8/8"]
    progress.allotted = 9
    assert live.row(progress)[3] == "8/9"


def test_full_disk_is_no_candidates_fault(kernel, tmp_path, monkeypatch):
    """Nothing is recorded of a candidate that could not be linked for want of room."""
    monkeypatch.setattr(generic, "KNOBS", {"lanes": (100, 1)})
    build, room = Builder._compile, shutil.disk_usage(tmp_path)

    def compile_(self, kernel, path):
        if path.name != "candidate1.so":  # the default's
            monkeypatch.setattr(shutil, "disk_usage", lambda _: room._replace(free=0))
            raise BuildError("ld: final link failed: No space left on device")
        build(self, kernel, path)

    monkeypatch.setattr(Builder, "_compile", compile_)
    with pytest.raises(BuildError, match="no room for candidates; what is measured is kept"):
        tuned(tmp_path)
    (path,) = store.find_directories(tmp_path)
    assert store.read(path).records == ()


def counted(function, asked: dict[int, int], i: int):
    def call(*arguments):
        asked[i] = asked.get(i, 0) + 1
        return function(*arguments)

    return call
