"""attention on AVX2: bytes_x86.py's loops, products_avx2.py's products.

Measured: Xeon (model 167) of 2 cores, shared and busy, 2026-11-22, TVM_NUM_THREADS=2, medians of 25
interleaved runs of generic and avx2, Hq/Hkv 20/5, D = 128, 3 bits, us: M = 1 at position 511 434
to 187, at 2047 1693 to 665; prefill of 64 rows ending at 511 19946 to 7250. In CPU time of one
thread, M = 1 at 511: 385 to 151 (median of 60).
"""

from tvm.tirx import PrimFunc

from schedules.attention import bytes_x86
from schedules.attention.products_avx2 import PRODUCTS
from schedules.targets import CpuTarget


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, target: CpuTarget
) -> PrimFunc:
    return bytes_x86.kernel(num_heads, num_kv_heads, head_dim, kv_bits, target, PRODUCTS)
