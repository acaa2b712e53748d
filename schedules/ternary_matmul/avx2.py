"""ternary_matmul on AVX2: look-up tables for 4-bit activations, multiplications for 8-bit ones.

A table of the sums of two 4-bit activations has entries of a byte, so that one look-up does 64
products; with 8-bit activations entries would take two bytes, and multiplying is as quick.
"""

from tvm.tirx import PrimFunc

from schedules.targets import CpuTarget
from schedules.ternary_matmul import columns_avx2, lookup_avx2


def layout(act_bits: int) -> str:
    return "pair_nibble" if act_bits == 4 else "columns_2bit"


def kernel(n: int, k: int, act_bits: int, target: CpuTarget, epilogue: str) -> PrimFunc:
    form = lookup_avx2 if act_bits == 4 else columns_avx2
    return form.kernel(n, k, target, epilogue)
