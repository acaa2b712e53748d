"""ternary_matmul on AVX2: look-up tables for 4-bit activations, multiplications for 8-bit ones and
for the rows that a gate leaves.

A table of the sums of two 4-bit activations has entries of a byte, so that one look-up does 64
products; with 8-bit activations entries would take two bytes, and multiplying is as quick.
The knob `lookup` = 0 multiplies 4-bit activations too.
"""

from tvm.tirx import PrimFunc

from schedules.epilogue import EPILOGUES
from schedules.targets import CpuTarget
from schedules.ternary_matmul import lookup_avx2, quads_avx2, rows_avx2, rows_x86
from schedules.ternary_matmul.quads_avx2 import MULTIPLY_ADD, Products

KNOBS = {"lookup": (1, 0), **lookup_avx2.KNOBS}


def layout(act_bits: int, epilogue: str = "scale", *, lookup: int = 1) -> str:
    if EPILOGUES[epilogue].is_gated:
        return rows_x86.LAYOUT
    return "pair_nibble" if lookup and act_bits == 4 else quads_avx2.LAYOUT


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
    products: Products = MULTIPLY_ADD,
) -> PrimFunc:
    if EPILOGUES[epilogue].is_gated:
        if (lookup, wide, l2_eighths) != (1, 4, 4):
            raise ValueError("ternary_matmul: rows by gate have no such choice")
        walk = {"streams": streams, "prefetch": prefetch}
        return rows_x86.kernel(n, k, target, epilogue, rows_avx2.vectors(act_bits), **walk)
    tiles = {"streams": streams, "wide": wide, "prefetch": prefetch}
    if lookup and act_bits == 4:
        return lookup_avx2.kernel(n, k, target, epilogue, l2_eighths=l2_eighths, **tiles)
    if l2_eighths != 4 or (act_bits == 8 and not lookup):
        raise ValueError("ternary_matmul: multiplying has no such choice")
    return quads_avx2.kernel(n, k, epilogue, products, **tiles)
