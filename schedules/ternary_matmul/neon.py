"""ternary_matmul on NEON: look-up tables for 4-bit activations, multiplications for 8-bit ones.

A table of the sums of two 4-bit activations has entries of a byte; with 8-bit activations entries
would take two bytes, and `smlal` by columns is as quick. On ARMv8.0 no product is wider than 8.
"""

from tvm.tirx import PrimFunc

from schedules.targets import CpuTarget
from schedules.ternary_matmul import columns_neon, lookup_neon, tiles_neon

# wide: rows of 4-bit activations that share nibbles; tiled: rows of 8-bit ones from which weights
# are unpacked; l2_eighths: of the target's L2, for a tile of rows
KNOBS = {"wide": (2, 4, 1), "tiled": (4, 2, 3), "l2_eighths": (4, 2, 8)}


def layout(act_bits: int, epilogue: str = "scale") -> str:
    return "pair_nibble" if act_bits == 4 else "columns_2bit"


def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: CpuTarget,
    epilogue: str,
    *,
    wide: int = 2,
    tiled: int = 4,
    l2_eighths: int = 4,
) -> PrimFunc:
    if act_bits == 4:
        return lookup_neon.kernel(n, k, target, epilogue, wide=wide, l2_eighths=l2_eighths)
    sizes = {"wide": tiled, "l2_eighths": l2_eighths}
    return columns_neon.kernel(n, k, target, epilogue, tiles_neon.LONG, **sizes)
