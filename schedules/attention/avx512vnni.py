"""attention on AVX-512 VNNI: bytes_x86.py's loops, products_avx512.py's products.

Measured: docs/log.md.
"""

from tvm.tirx import PrimFunc

from schedules.attention import bytes_x86
from schedules.attention.products_avx512 import PRODUCTS
from schedules.targets import CpuTarget


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, target: CpuTarget
) -> PrimFunc:
    return bytes_x86.kernel(num_heads, num_kv_heads, head_dim, kv_bits, target, PRODUCTS)
