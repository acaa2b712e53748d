"""A streaming read: every thread reads a share of the memory as one run or several at once.

The best that this host's memory gives a kernel that reads each byte once. Which form that is
differs: a Xeon wants runs that are prefetched, over the ends of pages; Zen 4 one or two that are
left to its own prefetchers, or lines asked for into L2. The sums are kept so that no read can be
left out.
"""

from contextlib import nullcontext

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin import threads
from schedules.intrin.lanes import ask_at, prefetch, prefetches_into_l2
from schedules.targets import CpuTarget

# (runs of memory at once, bytes ahead that lines are asked for, how often into L2 alone; 0: into
# L1): a read is the quickest of these
FORMS = ((1, 0, 0), (2, 0, 0), (4, 2048, 1), (4, 4096, 4), (8, 2048, 0))
LINE = 64


def kernel(nbytes: int, target: CpuTarget, runs: int, ahead: int, times: int) -> PrimFunc:
    """(memory, out): out[:, :16] of each thread, xored over all, are those of memory's lines."""
    lines = nbytes // LINE

    def read(sums, memory, line, ahead: int):
        for far in ask_at(ahead, LINE):
            prefetch(memory, line * LINE + far)
        value = T.reinterpret("int32x16", memory[T.ramp(line * LINE, 1, LINE)])
        T.buffer_store(sums, sums[T.ramp(0, 1, 16)] ^ value, [T.ramp(0, 1, 16)])

    with prefetches_into_l2(times) if times else nullcontext():

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
                    for i in T.serial((last - first) // runs):
                        for run in T.unroll(runs):
                            read(sums, memory, first + run * ((last - first) // runs) + i, ahead)
                    for i in T.serial((last - first) % runs):
                        read(sums, memory, last - 1 - i, 0)
                    out[task, T.ramp(0, 1, 16)] = sums[T.ramp(0, 1, 16)]

    return stream
