"""ternary_matmul with `smmla` for many rows, and `sdot` for few: quads_neon.py."""

from tvm.tirx import PrimFunc

from schedules.targets import CpuTarget
from schedules.ternary_matmul import quads_neon, tiles_neon

KNOBS = tiles_neon.KNOBS


def layout(act_bits: int, epilogue: str = "scale") -> str:
    return "quads_signed"


def kernel(
    n: int,
    k: int,
    act_bits: int,
    target: CpuTarget,
    epilogue: str,
    *,
    wide: int = 2,
    l1_eighths: int = 4,
    l2_eighths: int = 4,
) -> PrimFunc:
    knobs = {"wide": wide, "l1_eighths": l1_eighths, "l2_eighths": l2_eighths}
    return quads_neon.kernel(n, k, target, epilogue, tiles_neon.PAIRS, **knobs)
