"""A streaming read: every thread reads a share of the memory as several runs, prefetched.

The best that this host's memory gives a kernel that reads each byte once; the sums are kept so
that no read can be left out.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin import threads
from schedules.targets import CpuTarget

RUNS = 8  # of memory at once: what the kernels found best
AHEAD = 2048  # bytes
LINE = 64


def kernel(nbytes: int, target: CpuTarget) -> PrimFunc:
    lines = nbytes // LINE

    @T.prim_func(s_tir=True)
    def stream(memory: T.Buffer((nbytes,), "int8"), out: T.Buffer((256, 16), "int32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            tasks = T.min(threads.count(), 256)
            for task in T.parallel(tasks):
                sums = T.alloc_buffer((16,), "int32", scope="local")
                first = T.cast(threads.share(T.int64(lines), task, tasks), "int64")
                last = T.cast(threads.share(T.int64(lines), task + 1, tasks), "int64")
                sums[T.ramp(0, 1, 16)] = T.broadcast(0, 16)
                for i in T.serial((last - first) // RUNS):
                    for run in T.unroll(RUNS):
                        at = (first + run * ((last - first) // RUNS) + i) * LINE
                        T.evaluate(
                            T.call_llvm_intrin(
                                "void", "llvm.prefetch", T.address_of(memory[at + AHEAD]),
                                T.int32(0), T.int32(3), T.int32(1),
                            )
                        )  # fmt: skip
                        sums[T.ramp(0, 1, 16)] = sums[T.ramp(0, 1, 16)] ^ T.reinterpret(
                            "int32x16", memory[T.ramp(at, 1, LINE)]
                        )
                out[task, T.ramp(0, 1, 16)] = sums[T.ramp(0, 1, 16)]

    return stream
