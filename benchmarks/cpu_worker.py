"""Our side of benchmarks/cpu.py: a compiled model through the runtime, single kernels through TVM.

Speaks benchmarks/worker.py's protocol. Kernels are what `compiler.build` chooses for a target
without records, linked as a library is.
"""

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.worker import serve
from runtime import tvm_runtime
from runtime.engine import Engine

ALIGNMENT = 4096
DISTINCT_ROWS = 256  # of random weights; the rest repeats them


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start : start + nbytes].view(dtype).reshape(shape)


class Model:
    def __init__(self, path: str, context: int, threads: int, kv_bits: int) -> None:
        self.engine = Engine.load(
            path, threads=threads, context=context, kv_bits=kv_bits, verify=False
        )
        self.rng = np.random.default_rng(0)
        self.filled = 0

    def tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, self.engine.shape.vocab_size, count).tolist()

    def append(self, count: int) -> float:
        ids = self.tokens(count)
        started = time.perf_counter()
        if count == 1:
            self.engine.decode(ids, [0], [self.filled])
        else:
            self.engine.prefill(ids, 0, self.filled)
        self.filled += count
        return time.perf_counter() - started


class Kernels:
    """Builds kernels of a target; TVM's compiler is loaded only for these."""

    def __init__(self, target: str) -> None:
        import tvm

        from schedules import targets

        self.tvm, self.target = tvm, targets.find(target)
        self.nbytes = 0  # of the memory that a call of the prepared kernel reads once
        self.copies: Sequence[np.ndarray] = ()  # of that memory
        self.read_kernels: dict[int, list] = {}  # by bytes, in every form

    def link(self, func, is_launched_by_us: bool = True):
        from tvm.support import cc

        from compiler.pipeline import C_FLAGS, sources

        mod = self.tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
        options = [*C_FLAGS, *map(str, sources(self.target))] if is_launched_by_us else []
        compiled = self.tvm.compile(mod, target=self.target.to_tvm())
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:  # loaded, it is not needed
            path = f"{folder}/kernel.so"
            compiled.export_library(
                path, fcompile=partial(cc.create_shared, cc="gcc", options=options)
            )
            return self.tvm.runtime.load_module(path)["kernel"]

    def schedule(self, folder: str):
        from compiler.kernels import Schedule, default_choice

        return Schedule(folder, default_choice(folder, self.target.families))

    def weights(self, layout: str, n: int, k: int, copies: int) -> list:
        """TVM tensors over `copies` copies of packed random weights."""
        from schedules.layouts import LAYOUTS

        rng = np.random.default_rng(0)
        w = rng.integers(-1, 2, (min(n, DISTINCT_ROWS), k)).astype(np.int8)
        packed = LAYOUTS[layout].pack(np.resize(w, (n, k)))
        memory = aligned((copies, *packed.shape), "uint8")
        memory[:] = packed
        self.nbytes, self.copies = packed.nbytes, memory
        return [self.tvm.runtime.from_dlpack(copy) for copy in memory]

    def tensors(self, *arrays: np.ndarray) -> list:
        return [self.tvm.runtime.tensor(array) for array in arrays]

    def matmul(self, n: int, k: int, m: int, copies: int, act_bits: int):
        schedule = self.schedule("ternary_matmul")
        kernel = self.link(schedule.kernel(n, k, act_bits, self.target, "scale"))
        q = np.random.default_rng(1).integers(-8, 8, (m, k)).astype(np.int8)
        ones = np.ones(m, np.float32), np.ones(n, np.float32)
        q, scale, w_scale, out = self.tensors(q, *ones, np.zeros((m, n), np.float32))
        weights = self.weights(schedule.layout(act_bits), n, k, copies)
        return [partial(kernel, q, scale, w, w_scale, out) for w in weights]

    def sparse(self, n: int, k: int, m: int, copies: int, zeros: float):
        schedule, rng = self.schedule("sparse_ternary_matmul"), np.random.default_rng(1)
        kernel = self.link(schedule.kernel(n, k, self.target))
        q = np.where(rng.random((m, k)) < zeros, 0, rng.integers(1, 128, (m, k))).astype(np.int8)
        index, count = np.zeros((m, k), np.int32), np.count_nonzero(q, axis=1).astype(np.int32)
        for row in range(m):
            index[row, : count[row]] = np.flatnonzero(q[row])
        tensors = self.tensors(q, np.ones(m, np.float32), index, count)
        w_scale, residual, out = self.tensors(
            np.ones(n, np.float32), *np.zeros((2, m, n), np.float32)
        )
        weights = self.weights(schedule.layout(), n, k, copies)
        return [partial(kernel, *tensors, w, w_scale, residual, out) for w in weights]

    def head(self, n: int, k: int, m: int, copies: int, bits: int):
        from model import grouped

        folder, statics = ("int8_matmul", ()) if bits == 8 else ("grouped_matmul", (bits,))
        kernel = self.link(self.schedule(folder).kernel(n, k, *statics, self.target))
        rng = np.random.default_rng(0)
        if bits == 8:
            rows = rng.integers(-127, 128, (64, k), dtype=np.int8)
        else:  # group scales above 0, whatever the codes
            rows = rng.integers(1, 64, (64, grouped.row_bytes(k, bits)), dtype=np.uint8)
        table = aligned((copies, n, rows.shape[1]), str(rows.dtype))
        table[:] = np.resize(rows, (n, rows.shape[1]))
        self.nbytes, self.copies = table[0].nbytes, table
        q = rng.integers(-127, 128, (m, k), dtype=np.int8)
        ones = np.ones(m, np.float32), np.ones(n, np.float32)
        q, scale, w_scale, out = self.tensors(q, *ones, np.zeros((m, n), np.float32))
        tables = [self.tvm.runtime.from_dlpack(copy) for copy in table]
        return [partial(kernel, q, scale, w, w_scale, out) for w in tables]

    def launch(self, is_launched_by_us: bool, copies: int):
        """A parallel loop with next to nothing in it."""
        from tvm.script import tirx as T

        @T.prim_func(s_tir=True)
        def nothing(out: T.Buffer((64, 16), "int32")):
            for i in T.parallel(64):
                out[i, 0] = i

        kernel = self.link(nothing, is_launched_by_us)
        (out,) = self.tensors(np.zeros((64, 16), np.int32))
        return [partial(kernel, out)] * copies

    def stream(self, nbytes: int):
        """Read memory and do nothing else, in every form: what each floor is made of."""
        memory = aligned((1, nbytes), "int8")
        memory[:] = 1
        self.nbytes, self.copies = nbytes, memory
        return [call for calls in self.reads() for call in calls]

    def reads(self) -> list[list]:
        """Of every form, a call a copy: each reads it once and does nothing else."""
        from benchmarks.stream import FORMS, kernel

        if self.nbytes not in self.read_kernels:
            self.read_kernels[self.nbytes] = [
                self.link(kernel(self.nbytes, self.target, *form)) for form in FORMS
            ]
        out = self.tvm.runtime.from_dlpack(aligned((256, 16), "int32"))
        runs = [copy.reshape(-1).view(np.int8) for copy in self.copies]
        tensors = [self.tvm.runtime.from_dlpack(run) for run in runs]
        return [[partial(k, x, out) for x in tensors] for k in self.read_kernels[self.nbytes]]


def seconds_of(calls: list) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - started) / len(calls)


class Ours:
    """The requests; see benchmarks/worker.py."""

    def __init__(self) -> None:
        self.model: Model | None = None
        self.kernels: Kernels | None = None
        self.target = "native"
        self.calls: list = []
        self.reads: list[list] = []  # of the same memory
        self.are_forms = False  # of one read, not copies of one kernel's weights

    def use_target(self, name: str) -> dict:
        """Whose kernels `prepare` builds from now on."""
        self.target, self.kernels = name, None
        return {}

    def load(self, path: str, context: int, threads: int, kv_bits: int) -> dict:
        self.model = Model(path, context, threads, kv_bits)
        return {"target": self.model.engine.artifact.target}

    def threads(self, count: int) -> dict:
        self.model.engine.threads = count
        return {}

    def prompt(self, tokens: int) -> dict:
        self.model.filled = 0
        return {"seconds": self.model.append(tokens)}

    def fill(self, position: int) -> dict:
        if self.model.filled < position:
            self.model.append(position - self.model.filled)
        return {}

    def decode(self, steps: int) -> dict:
        return {"seconds": sum(self.model.append(1) for _ in range(steps))}

    def clear(self) -> dict:
        self.model.filled = 0
        return {}

    def zeros(self) -> dict:
        """Mean share of zeros that a decode step meets at o_proj and down_proj."""
        engine = self.model.engine
        found = engine.sparsity(self.model.tokens(1), [0], [self.model.filled])
        return {"zeros": None if found is None else found.mean(axis=0).tolist()}

    def prepare(self, kind: str, **arguments) -> dict:
        """Build a kernel and its operands: the name of a method of `Kernels`."""
        self.kernels = self.kernels or Kernels(self.target)
        self.calls, self.reads = [], []
        self.kernels.copies = ()  # before the next are made
        self.calls = getattr(self.kernels, kind)(**arguments)
        self.are_forms = kind == "stream"
        return {"bytes": self.kernels.nbytes}

    def kernel(self, threads: int) -> dict:
        """Seconds of a call, mean over the copies of its weights; of forms, the quickest's."""
        tvm_runtime.use_threads(threads)
        if self.are_forms:
            return {"seconds": min(seconds_of([call]) for call in self.calls)}
        return {"seconds": seconds_of(self.calls)}

    def read(self, threads: int) -> dict:
        """Seconds of a streaming read of what a call reads, over the same copies in turn."""
        tvm_runtime.use_threads(threads)
        self.reads = self.reads or self.kernels.reads()
        return {"seconds": min(seconds_of(calls) for calls in self.reads)}


if __name__ == "__main__":
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    serve(Ours())
