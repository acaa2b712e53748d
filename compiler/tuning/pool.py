"""Pool: the runner processes, one here or one for each server of an RPC key.

A process that crashes or hangs is ended and replaced before the next request.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from compiler.config import BuildError
from schedules.targets import GpuTarget, TargetSpec

ROOT = Path(__file__).parents[2]
START_SECONDS = 120  # to import TVM, and to be given a server by a tracker
SESSION_SECONDS = 3600


class RunError(Exception):
    """A candidate that did not run; the message begins with crash, hang or error."""


class NotStarted(BuildError):
    """A runner that cannot be started; the others may go on."""

    def __init__(self, message: str, worker: "Worker") -> None:
        super().__init__(message)
        self.worker = worker


@dataclass(frozen=True)
class Rpc:
    host: str
    port: int
    key: str


class Worker:
    """A runner process; `ask` starts it, and starts it anew after a failure."""

    def __init__(self, target: TargetSpec, threads: int, rpc: Rpc | None = None) -> None:
        self._kind = "cuda" if isinstance(target, GpuTarget) else "cpu"
        self._threads, self._rpc = threads, rpc
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._task: dict | None = None

    def set_task(self, files: dict) -> None:
        self._task = files
        if self._process is not None:
            self._request("task", files, START_SECONDS)

    def check(self, library: Path, layout: str, seconds: float) -> str:
        return self.ask("check", (library, layout), seconds)

    def race(
        self,
        libraries: Sequence[tuple[Path, str]],
        rows: list[int],
        rounds: int,
        seconds: float,
        limit: float,
    ) -> list[dict[int, list[float]]]:
        return self.ask("race", (list(libraries), rows, rounds, seconds), limit)

    def ask(self, action: str, arguments: tuple, seconds: float) -> Any:
        if self._process is None:
            self._start()
        return self._request(action, arguments, seconds)

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._connection
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> None:
        ours, theirs = Pipe()
        environment = os.environ | {
            "TVM_NUM_THREADS": str(self._threads),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "compiler.tuning.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the command, which then ends this
            )
        self._connection = ours
        rpc = (self._rpc.host, self._rpc.port, self._rpc.key) if self._rpc else None
        try:
            ours.send((self._kind, rpc, SESSION_SECONDS))
            self._receive(START_SECONDS)
            if self._task is not None:
                self._request("task", self._task, START_SECONDS)
        except RunError as error:
            self.close()
            where = (
                f"rpc {self._rpc.host}:{self._rpc.port} key {self._rpc.key}" if self._rpc else ""
            )
            raise NotStarted(
                f"runner: {where or 'process'} did not start ({error}); possible: "
                + (
                    "a tracker and a free server of that key" if where else "pip install apache-tvm"
                ),
                self,
            ) from error

    def _request(self, action: str, arguments: Any, seconds: float) -> Any:
        assert self._connection
        try:
            self._connection.send((action, arguments))
        except OSError as error:
            raise RunError(self._how_it_ended()) from error
        return self._receive(seconds)

    def _receive(self, seconds: float) -> Any:
        assert self._connection
        try:
            if not self._connection.poll(seconds):
                self.close()
                raise RunError(f"hang: no answer in {seconds:.0f} s")
            status, result = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise RunError(self._how_it_ended()) from error
        except KeyboardInterrupt:
            self.close()
            raise
        if status == "error":
            if self._rpc:  # the server's loop may have ended with it; a process asks for another
                self.close()
            raise RunError(f"error: {result}")
        return result

    def _how_it_ended(self) -> str:
        assert self._process
        code = self._process.wait()
        self.close()
        return f"crash: {signal.Signals(-code).name}" if code < 0 else f"crash: exit code {code}"


def count_servers(rpc: Rpc | None) -> int:
    """Servers of the key that the tracker knows; one process where none is asked for."""
    if rpc is None:
        return 1
    from tvm import rpc as tvm_rpc

    try:
        # TVM tries for a minute; a tracker that is there answers at once.
        socket.create_connection((rpc.host, rpc.port), timeout=5).close()
        tracker = tvm_rpc.connect_tracker(rpc.host, rpc.port)
        servers = tracker.summary()["server_info"]
    except (OSError, RuntimeError) as error:
        raise BuildError(
            f"rpc: no tracker at {rpc.host}:{rpc.port} ({str(error).splitlines()[0]}); possible: "
            "python -m tvm.exec.rpc_tracker --host 127.0.0.1 --port 9190"
        ) from error
    keys = [server["key"].removeprefix("server:") for server in servers]
    if rpc.key not in keys:
        raise BuildError(
            f"rpc: no server of key {rpc.key!r} at {rpc.host}:{rpc.port}; "
            f"possible: {', '.join(sorted(set(keys))) or 'none is there'}"
        )
    return keys.count(rpc.key)


def spread(workers: Sequence[Worker], items: Sequence[Any], work: Callable[[Worker, list], list]):
    """work(worker, share) for an even share of the items each, at once; results in order."""
    shares = [list(items[i :: len(workers)]) for i in range(len(workers))]
    if len(workers) == 1:
        return work(workers[0], shares[0])
    results: list[Any] = [None] * len(items)
    with ThreadPoolExecutor(len(workers)) as threads:
        jobs = [threads.submit(work, w, s) for w, s in zip(workers, shares, strict=True) if s]
        for i, job in enumerate(jobs):
            results[i :: len(workers)] = job.result()
    return results
