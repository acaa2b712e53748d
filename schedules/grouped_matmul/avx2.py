"""grouped_matmul on AVX2: rows_x86.py with a line of the table in two registers."""

from tvm.tirx import PrimFunc

from schedules.grouped_matmul import rows_x86
from schedules.intrin import avx2
from schedules.targets import CpuTarget

KNOBS = {"streams": (4, 2, 8), "prefetch": (2048, 0, 4096)}
VECTORS = rows_x86.Vectors(
    bytes=32,
    rows=2,
    multiply_add_bytes=avx2.multiply_add_bytes,
    add_products=lambda sums, a, b: sums + avx2.multiply_add_words(a, b),
)


def kernel(
    n: int, k: int, bits: int, target: CpuTarget, *, streams: int = 4, prefetch: int = 2048
) -> PrimFunc:
    return rows_x86.kernel(n, k, bits, streams, prefetch, VECTORS)
