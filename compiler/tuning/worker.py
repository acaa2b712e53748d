"""Worker: the process that runs candidates, here or behind RPC; it may crash or hang.

    python -m compiler.tuning.worker FD          started by pool.py

Requests and replies go through a multiprocessing connection:

    task   files of a task's cases and weights     -> None      they stay until the next task
    check  a library                               -> "ok", or how it differs from the reference
    race   libraries, rounds                       -> seconds[library][rows][round]

A race times the libraries in turn, there and back, one call at each number of rows a round, so
that what slows the machine for a while slows them all. Every call reads another copy of the
weights, and the copies together exceed the last-level cache, as a model's weights do. What runs
here is, for a CPU, TVM's 5 MB runtime: neither torch nor the compiler is imported.
"""

import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

ENTRY = "kernel"


class Device:
    """Where kernels run: this process, or a server that a tracker gave us."""

    def __init__(self, kind: str, rpc: tuple[str, int, str] | None, session_seconds: int) -> None:
        if kind == "cpu":  # of a GPU, the compiler's library brings the driver's part
            os.environ["TVM_USE_RUNTIME_LIB"] = "1"
        import tvm

        self._tvm = tvm
        self._remote = None
        self._modules: dict[Path, Any] = {}
        if rpc:
            from tvm import rpc as tvm_rpc

            host, port, key = rpc
            tracker = tvm_rpc.connect_tracker(host, port)
            self._remote = tracker.request(key, priority=1, session_timeout=session_seconds)
        place = self._remote or tvm
        self.device = place.cuda(0) if kind == "cuda" else place.cpu(0)
        # A clock on the device's side, where calls are queued or far away.
        self._clock_is_there = kind != "cpu" or rpc is not None

    def load(self, path: Path) -> Any:
        """Loaded once and kept: a function there does not keep its module, nor may a file that is
        mapped there be written again."""
        if path not in self._modules:
            if self._remote is None:
                self._modules[path] = self._tvm.runtime.load_module(str(path))
            else:
                name = f"{len(self._modules)}-{path.name}"
                self._remote.upload(str(path), name)
                self._modules[path] = self._remote.load_module(name)
        return self._modules[path]

    def tensor(self, array: np.ndarray) -> Any:
        return self._tvm.runtime.tensor(array, self.device)

    def copies(self, tensor: Any, count: int) -> list[Any]:
        """`tensor` and `count - 1` others like it, copied there."""
        shape, dtype = tensor.shape, str(tensor.dtype)
        others = [self._tvm.runtime.empty(shape, dtype, self.device) for _ in range(count - 1)]
        for other in others:
            tensor.copyto(other)
        return [tensor, *others]

    def timer(self, module: Any):
        """time(*arguments) -> seconds of one call."""
        if self._clock_is_there:
            evaluator = module.time_evaluator(ENTRY, self.device, number=1, repeat=1)
            return lambda *arguments: float(evaluator(*arguments).results[0])
        function = module[ENTRY]

        def call(*arguments) -> float:
            start = time.perf_counter_ns()
            function(*arguments)
            return (time.perf_counter_ns() - start) * 1e-9

        return call


class Case:
    """Arguments at one number of rows, on the device, and the result to expect."""

    def __init__(self, path: Path, device: Device) -> None:
        with np.load(path) as arrays:
            names = sorted(arrays.files)  # before0, before1, ...: fewer than ten of each
            self.before = [device.tensor(arrays[n]) for n in names if n.startswith("before")]
            self.after = [device.tensor(arrays[n]) for n in names if n.startswith("after")]
            self.expected = arrays["expected"]
        self.nothing = np.full_like(
            self.expected, np.nan if self.expected.dtype.kind == "f" else -1
        )
        self.out = device.tensor(self.nothing)

    def arguments(self, weights: Any) -> list[Any]:
        return [*self.before, weights, *self.after, self.out]

    def difference(self) -> str | None:
        found = self.out.numpy()
        wrong = found.view(np.uint32) != self.expected.view(np.uint32)
        # 0 and -0 are equal, as where a gate is closed
        wrong &= ~((found == 0) & (self.expected == 0))
        if not wrong.any():
            return None
        return f"M={len(found)}: {wrong.sum()} of {wrong.size} outputs differ"


class Task:
    """Cases and weights; a layout's copies are made when it is first met."""

    def __init__(self, device: Device, files: dict) -> None:
        self._device = device
        self._weights: dict[str, list[Any]] = {}
        self._paths, self._cold_bytes = files["weights"], files["cold_bytes"]
        self.cases = {rows: Case(path, device) for rows, path in files["cases"].items()}
        self._turn = 0

    def weights(self, layout: str) -> Any:
        """The copy whose last use is the longest ago."""
        if layout not in self._weights:
            array = np.load(self._paths[layout])
            count = max(1, -(-self._cold_bytes // array.nbytes))
            self._weights[layout] = self._device.copies(self._device.tensor(array), count)
        self._turn += 1
        copies = self._weights[layout]
        return copies[self._turn % len(copies)]

    def check(self, path: Path, layout: str) -> str:
        function = self._device.load(path)[ENTRY]
        for case in self.cases.values():
            case.out.copyfrom(case.nothing)
            function(*case.arguments(self.weights(layout)))
            if problem := case.difference():
                return f"wrong: {problem}"
        return "ok"

    def race(
        self, libraries: list[tuple[Path, str]], rows: list[int], rounds: int, seconds: float
    ) -> list[dict[int, list[float]]]:
        """`rounds` of them, fewer where they take longer than `seconds`, but at least 3."""
        timers = [
            (self._device.timer(self._device.load(path)), layout) for path, layout in libraries
        ]
        for time_call, layout in timers:  # what a first call sets up is not timed
            for m in rows:
                time_call(*self.cases[m].arguments(self.weights(layout)))
        found: list[dict[int, list[float]]] = [{m: [] for m in rows} for _ in timers]
        started = time.monotonic()
        for turn in range(rounds):
            if turn >= 3 and time.monotonic() - started > seconds:
                break
            order = range(len(timers)) if turn % 2 == 0 else reversed(range(len(timers)))
            for i in order:
                time_call, layout = timers[i]
                for m in rows:
                    for _ in range(2):  # the first finds the library's threads asleep
                        arguments = self.cases[m].arguments(self.weights(layout))
                        seconds_taken = time_call(*arguments)
                    found[i][m].append(seconds_taken)
        return found


def serve(connection: Connection) -> None:
    kind, rpc, session_seconds = connection.recv()
    device = Device(kind, rpc, session_seconds)
    connection.send(("done", None))
    task: Task | None = None
    while True:
        try:
            action, arguments = connection.recv()
        except EOFError:
            return
        try:
            if action == "task":
                task = None  # free the copies of the last one first
                task, result = Task(device, arguments), None
            else:
                result = getattr(task, action)(*arguments)
            connection.send(("done", result))
        except Exception as error:  # what TVM raises has no common type
            lines = str(error).strip().splitlines() or [type(error).__name__]
            connection.send(("error", lines[-1].strip()))


def main() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment] # tvm_ffi imports it where it can
    with Connection(int(sys.argv[1])) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
