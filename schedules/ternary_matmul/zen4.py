"""ternary_matmul on Zen 4: avx512vbmi.py, weights asked for into L2, four times each.

Why four times: intrin/zen.py. 8-bit activations look up in two tables a row, which then gain from
half the streams.

Measured: EPYC of family 25, model 17, 2 cores, 2026-11-23, cold, us with one thread and with two:

    6912 x 2560 INT4   into L1 266, 188; none 212, 155; into L2 once 190, 142
    another hour       once 185, 142; four times, 2048 bytes ahead 163, 130; 4096 ahead 163, 134;
                       two streams 157, 132; six and eight times 1.00 to 1.18 of the time of four
    INT8               once 201, 121; four times 189, 111; two streams 168, 99
    by gate, 67 %      into L1 178, 114; none 286, 269; once 125, 92; twice 102, 75; four times,
    needless           2048 ahead 89, 60; 4096 ahead 80, 60; two streams 99, 58
"""

from tvm.tirx import PrimFunc

from schedules.epilogue import EPILOGUES
from schedules.intrin import zen
from schedules.targets import CpuTarget
from schedules.ternary_matmul import avx512vbmi, lookup_avx512

KNOBS = avx512vbmi.KNOBS | {"prefetch": (4096, 2048, 0)}
layout = avx512vbmi.layout


@zen.prefetching
def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: CpuTarget,
    epilogue: str,
    *,
    streams: int = 4,
    prefetch: int = 4096,
    blocks_a_task: int = 1,
) -> PrimFunc:
    if not EPILOGUES[epilogue].is_gated:
        streams = max(1, streams // lookup_avx512.digits_of(act_bits))
    return avx512vbmi.kernel(
        n, k, act_bits, target, epilogue,
        streams=streams, prefetch=prefetch, blocks_a_task=blocks_a_task,
    )  # fmt: skip
