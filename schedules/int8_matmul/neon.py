"""int8_matmul with `smull`: rows_neon.py."""

from tvm.tirx import PrimFunc

from schedules.int8_matmul import rows_neon
from schedules.targets import CpuTarget

KNOBS = rows_neon.KNOBS


def kernel(n: int, k: int, target: CpuTarget, *, streams: int = 4) -> PrimFunc:
    return rows_neon.kernel(n, k, target, rows_neon.long_product, streams=streams)
