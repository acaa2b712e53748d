"""ternary_matmul on AVX2: look-up tables for 4-bit activations, multiplications for 8-bit ones and
for the rows that a gate leaves.

A table of the sums of two 4-bit activations has entries of a byte, so that one look-up does 64
products; with 8-bit activations entries would take two bytes, and multiplying is as quick.
The knob `lookup` = 0 multiplies 4-bit activations too: its weights are an eighth fewer bytes.
"""

from tvm.tirx import PrimFunc

from schedules.epilogue import EPILOGUES
from schedules.targets import CpuTarget
from schedules.ternary_matmul import columns_avx2, lookup_avx2, rows_avx2, rows_x86

KNOBS = {"lookup": (1, 0), **lookup_avx2.KNOBS}


def layout(act_bits: int, epilogue: str = "scale", *, lookup: int = 1) -> str:
    if EPILOGUES[epilogue].is_gated:
        return rows_x86.LAYOUT
    return "pair_nibble" if lookup and act_bits == 4 else "columns_2bit"


def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: CpuTarget,
    epilogue: str,
    *,
    lookup: int = 1,
    streams: int = 4,
    wide: int = 4,
    l2_eighths: int = 4,
    prefetch: int = 2048,
) -> PrimFunc:
    if EPILOGUES[epilogue].is_gated:
        if (lookup, wide, l2_eighths) != (1, 4, 4):
            raise ValueError("ternary_matmul: rows by gate have no such choice")
        walk = {"streams": streams, "prefetch": prefetch}
        return rows_x86.kernel(n, k, target, epilogue, rows_avx2.vectors(act_bits), **walk)
    if lookup and act_bits == 4:
        tiles = {"streams": streams, "wide": wide, "l2_eighths": l2_eighths, "prefetch": prefetch}
        return lookup_avx2.kernel(n, k, target, epilogue, **tiles)
    if (streams, prefetch) != (4, 2048) or (act_bits == 8 and not lookup):
        raise ValueError("ternary_matmul: multiplying has no such choice")
    return columns_avx2.kernel(n, k, target, epilogue, wide=wide, l2_eighths=l2_eighths)
