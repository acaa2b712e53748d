"""rope_attention against numpy: the cache bit for bit, the result as test_attention.py has it."""

import numpy as np
import pytest

from schedules.targets import TARGETS
from tests.schedules import kv_reference
from tests.schedules.compiled import compiled, params
from tests.schedules.matmul_reference import module
from tests.schedules.test_attention import SLOTS, expected, filled
from tests.schedules.test_rope import rotated

F32 = np.float32
EVERY_TARGET = pytest.mark.parametrize("target", params([TARGETS["cuda-sm90"]]))
CONTEXT = 4200
# Groups of one, two, four heads and of more than a block has
SHAPES = [(3, 3, 64), (4, 2, 64), (5, 1, 128), (20, 5, 128), (8, 1, 64)]


@EVERY_TARGET
@pytest.mark.parametrize("kv_bits", [4, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, kv_bits, target):
    heads, kv_heads, dim = shape
    rng = np.random.default_rng(dim)
    angle = rng.uniform(-np.pi, np.pi, (CONTEXT, dim // 2))
    cos, sin = np.cos(angle).astype(F32), np.sin(angle).astype(F32)
    func = module("rope_attention", target).kernel(*shape, CONTEXT, kv_bits, target)
    run, (codes, scales) = compiled(func, target), filled(shape, kv_bits, CONTEXT, rng)
    for position in (0, 1, 31, 63, 64, 65, 127, 300, 511, 512, 513, 2047, 2048, 4199):
        slot, where = np.array([position % SLOTS]), np.array([position])
        qkv = rng.standard_normal((1, heads + 2 * kv_heads, dim)).astype(F32)
        flat, y = qkv.reshape(1, -1), np.full((1, heads * dim), np.nan, F32)
        found = run(flat, cos, sin, codes, scales, slot, where, y)
        turned = qkv.copy()
        rotating = slice(0, heads + kv_heads)
        turned[:, rotating] = rotated(qkv[:, rotating], cos[where], sin[where])
        after = codes.copy(), scales.copy()
        row = turned.reshape(1, -1), slot, where, heads, kv_heads, kv_bits
        kv_reference.append(*after, *row)
        np.testing.assert_array_equal(found[3], after[0])
        np.testing.assert_array_equal(found[4], after[1])
        levels = kv_reference.levels(after[0][slot[0]], kv_bits, dim)[None]
        exact = expected(turned[:, :heads], levels, after[1][slot], where)
        np.testing.assert_array_max_ulp(found[-1].reshape(exact.shape), exact, maxulp=1)
        assert np.count_nonzero(found[-1].reshape(exact.shape) != exact) <= 1
