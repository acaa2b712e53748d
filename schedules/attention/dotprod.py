"""attention with `sdot` on a quantised cache: generic's loops, products_dotprod.py's products.

A cache of 16 bits is generic's. Counted: docs/log.md.
"""

from tvm.tirx import PrimFunc

from schedules.attention import generic
from schedules.attention.products_dotprod import PRODUCTS
from schedules.targets import CpuTarget


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, target: CpuTarget
) -> PrimFunc:
    products = None if kv_bits == 16 else PRODUCTS
    return generic.kernel(num_heads, num_kv_heads, head_dim, kv_bits, target, products)
