"""Servers that measure: two in parallel, one that is gone, one that ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from compiler.config import BuildError
from compiler.tuning import store
from compiler.tuning.pool import NotStarted, Rpc, RunError, Worker, count_servers
from compiler.tuning.runners import Runners
from schedules.int8_matmul import generic
from tests.compiler.tuning.planted import NONE, TARGET, WRONG, make_task, one_worker, results, tuned


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


def counted(function, asked: dict[int, int], i: int):
    def call(*arguments):
        asked[i] = asked.get(i, 0) + 1
        return function(*arguments)

    return call


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
