"""attention on ARMv8.0: generic's loops, products_neon.py's products on a quantised cache.

A cache of 16 bits is generic's. Counted: docs/log.md.
"""

from functools import partial

from tvm.tirx import PrimFunc

from schedules.attention import generic, products_neon
from schedules.targets import CpuTarget


def kernel(
    num_heads: int, num_kv_heads: int, head_dim: int, kv_bits: int, target: CpuTarget
) -> PrimFunc:
    products = None
    if kv_bits < 16:
        products = generic.Products(
            "int8",
            "int32",
            products_neon.LANES,
            products_neon.QUERY_TILE,
            products_neon.multiply_keys,
            partial(products_neon.multiply_values, kv_bits=kv_bits),
        )
    return generic.kernel(num_heads, num_kv_heads, head_dim, kv_bits, target, products)
