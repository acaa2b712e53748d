"""grouped_matmul on AVX-512 VNNI: rows_x86.py, a line of the table a register, `vpdpwssd`."""

from tvm.tirx import PrimFunc

from schedules.grouped_matmul import rows_x86
from schedules.intrin import avx512
from schedules.targets import CpuTarget

KNOBS = {"streams": (8, 4, 2, 16), "prefetch": (2048, 0, 4096)}
VECTORS = rows_x86.Vectors(
    bytes=avx512.LINE,
    rows=4,
    multiply_add_bytes=avx512.multiply_add_bytes,
    add_products=avx512.dot_words,
)


def kernel(
    n: int, k: int, bits: int, target: CpuTarget, *, streams: int = 8, prefetch: int = 2048
) -> PrimFunc:
    return rows_x86.kernel(n, k, bits, streams, prefetch, VECTORS)
