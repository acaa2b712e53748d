"""The engines that benchmarks/cpu.py compares, and what has been measured of them.

Each engine is a process of its own; each repetition asks every engine once, in turn, so that a
noisy spell meets all of them; so does a streaming read of memory, which shares refer to.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import cold, cpu_peer
from benchmarks.commit import commit
from benchmarks.cpu_page import OURS, Row, show_row
from benchmarks.worker import Worker, WorkerError

HERE = Path(__file__).resolve().parent
PAUSE = 0.1  # seconds before a sample: llama.cpp's threads spin on for some 10 ms after theirs
READ, DENSE = "read", "our dense"  # processes of their own: a streaming read, a dense kernel


class Bench:
    """The workers and what has been measured."""

    def __init__(self, options: argparse.Namespace, target: str) -> None:
        self.options, self.target = options, target
        self.commit = options.commit or commit()  # at the start: a checkout may change meanwhile
        self.rows: list[Row] = []
        self.started: list[Worker] = []
        try:
            self.start(options, target)
        except BaseException:
            self.close()
            raise

    def start(self, options: argparse.Namespace, target: str) -> None:
        ours = HERE / "cpu_worker.py"
        self.shape = json.loads((options.artifact / "config.json").read_text(encoding="utf-8"))
        self.manifest = json.loads((options.artifact / "artifact.json").read_text(encoding="utf-8"))
        self.kv_bits = options.kv_bits or self.manifest["default_kv_bits"]
        peers = {}
        if options.peer_python:  # first: what is most often wrong, before anything takes time
            cpu_peer.check_shape(self.shape, options.only)
            script = HERE / "llama_cpp_peer.py"
            peers = {kind: self.run(kind, options.peer_python, script) for kind in options.peers}
        self.versions = {name: self.version(peer) for name, peer in peers.items()}
        kernels = [self.run(name, sys.executable, ours) for name in (READ, DENSE, OURS)]
        self.reader, self.dense, own = kernels
        self.workers = {OURS: own, **peers}
        for worker in kernels:
            worker.ask("use_target", name=target)
        self.reader.ask("prepare", kind="stream", nbytes=cold.stream_bytes())

    def run(self, name: str, python: str, script: Path) -> Worker:
        self.started.append(Worker(name, python, script))
        return self.started[-1]

    def close(self) -> None:
        for worker in self.started:
            worker.close()

    def version(self, peer: Worker) -> str:
        try:
            return peer.ask("hello")["version"]
        except WorkerError as error:
            raise WorkerError(
                f"{error}: asked for {self.options.peer_python}; possible: --peer-python with a "
                "Python that has llama-cpp-python, gguf and numpy"
            ) from error

    def worker(self, name: str) -> Worker:
        return self.dense if name == DENSE else self.workers[name]

    @property
    def engines(self) -> list[str]:
        return [*self.workers, DENSE]

    def measure(
        self,
        group: str,
        test: str,
        threads: int,
        amount: float,
        unit: str,
        ask: dict[str, Callable[[Worker], float]],
        floor: dict[str, float],
        read: Callable[[int], float] | None = None,
    ) -> None:
        """A row: each engine of `ask`, one repetition of all after another, the first thrown
        away. Where bytes bound it, every repetition begins with a streaming read: by `read`
        (threads -> bytes a second), or of much memory in one run."""
        samples: dict[str, list[float]] = {name: [] for name in ask}
        reads = []
        for repetition in range(self.options.repetitions + 1):
            if floor:
                time.sleep(PAUSE)
                reads.append((read or self.stream)(threads))
            for name, seconds in ask.items():
                time.sleep(PAUSE)
                found = seconds(self.worker(name))
                if repetition:
                    samples[name].append(found)
        bandwidth = statistics.median(reads[1:]) if reads else 0
        row = Row(group, test, threads, amount, unit, samples, floor, bandwidth)
        self.rows.append(row)
        print(show_row(self.engines, row), file=sys.stderr)

    def stream(self, threads: int) -> float:
        return cold.stream_bytes() / self.reader.ask("kernel", threads=threads)["seconds"]

    def kernel(
        self, test: str, amount: float, unit: str, ask: dict[str, dict], share: float = 0
    ) -> None:
        """Prepared kernels of the engines in `ask`, at every number of threads; of its weights
        ours needs `share`, 0 where something else bounds it. The read beside it is of the same
        copies: a launch, and the first lines of so few bytes, cost it what they cost the kernel."""
        nbytes = {
            name: self.worker(name).ask("prepare", **r).get("bytes") for name, r in ask.items()
        }
        floor = {OURS: nbytes[OURS] * share} if share else {}

        def read(threads: int) -> float:
            return nbytes[OURS] / self.workers[OURS].ask("read", threads=threads)["seconds"]

        for threads in self.options.threads:
            calls = dict.fromkeys(
                ask, lambda worker, t=threads: worker.ask("kernel", threads=t)["seconds"]
            )
            self.measure("kernels", test, threads, amount, unit, calls, floor, read)
