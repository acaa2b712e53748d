"""sparse_ternary_matmul by a dense kernel: the lists are not read, the residual is added.

Its one family needs AMX, where test_knobs.py runs it; this holds the arguments on any CPU.
"""

import numpy as np

from schedules.layouts import LAYOUTS
from schedules.sparse_ternary_matmul.dense import ACT_BITS, with_lists
from schedules.targets import TARGETS
from schedules.ternary_matmul import generic
from tests.schedules.compiled import compiled
from tests.schedules.matmul_reference import activations, exact_sum, ones, weights

M, N, K = 3, 70, 129


def test_lists_are_unread_and_the_residual_is_added():
    target = TARGETS["generic"]
    call = compiled(with_lists(generic.kernel(N, K, ACT_BITS, target, "residual")), target)
    q, w = activations("random", M, K, ACT_BITS), weights("random", N, K)
    (scale, w_scale), lists = ones(M, N), np.full((M, K), 1 << 30, np.int32)
    residual = np.arange(M * N, dtype=np.float32).reshape(M, N)
    packed = LAYOUTS[generic.layout(ACT_BITS)].pack(w)
    out = np.full((M, N), np.nan, np.float32)
    count = np.full(M, 1 << 30, np.int32)
    found = call(q, scale, lists, count, packed, w_scale, residual, out)[-1]
    np.testing.assert_array_equal(found, exact_sum(q, w) + residual)
