"""sparse_ternary_matmul with `smlal`: columns_neon.py."""

from tvm.tirx import PrimFunc

from schedules.sparse_ternary_matmul import columns_neon
from schedules.targets import CpuTarget
from schedules.ternary_matmul import tiles_neon

KNOBS = columns_neon.KNOBS


def layout() -> str:
    return "columns_2bit"


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    *,
    most_eighths: int = 6,
    batch_sixteenths: int = 4,
    stripe: int = 2,
    l2_eighths: int = 4,
) -> PrimFunc:
    return columns_neon.kernel(
        n,
        k,
        target,
        tiles_neon.LONG,
        most_eighths=most_eighths,
        batch_sixteenths=batch_sixteenths,
        stripe=stripe,
        l2_eighths=l2_eighths,
    )
