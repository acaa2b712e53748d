"""ternary_matmul on AVX2: look-up for 4-bit activations."""

from tvm.tirx import PrimFunc

from schedules.targets import TargetSpec
from schedules.ternary_matmul import generic, lookup_avx2


def layout(act_bits: int) -> str:
    return "pair_nibble" if act_bits == 4 else generic.layout(act_bits)


def kernel(n: int, k: int, act_bits: int, target: TargetSpec, epilogue: str) -> PrimFunc:
    if act_bits == 4:
        return lookup_avx2.kernel(n, k, target, epilogue)
    return generic.kernel(n, k, act_bits, target, epilogue)
