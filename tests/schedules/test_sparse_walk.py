"""Whether sparse_ternary_matmul on x86 walks its list: lists that leave columns out.

Correct lists have all columns that are not zero, so that a kernel which ignores them is as right as
it is slow. By these a result is the sum of the listed columns, or of all.
"""

import numpy as np
import pytest

from schedules.targets import TargetSpec
from tests.schedules.compiled import every_cpu, is_emulated, params
from tests.schedules.matmul_reference import (
    activations,
    exact_sum,
    module,
    ones,
    sparse_ternary_matmul,
    weights,
)

WALKED = [
    row
    for row in every_cpu("sparse_ternary_matmul")
    if not is_emulated(row)
    and "most_eighths" in getattr(module("sparse_ternary_matmul", row), "KNOBS", ())
]
N, K = 300, 512


def found_and_listed(target: TargetSpec, counts: list[int]):
    """(found, sums of the listed columns, sums of all), a row for each count"""
    q, w = activations("random", len(counts), K, 8), weights("random", N, K)
    q[q == 0] = 1
    index, listed = np.zeros(q.shape, np.int32), np.zeros_like(q)
    for row, count in enumerate(counts):
        columns = np.sort(np.random.default_rng(row).permutation(K)[:count])
        index[row, :count], listed[row, columns] = columns, q[row, columns]
    scale, w_scale = ones(len(counts), N)
    before = q, scale, index, np.array(counts, np.int32)
    residual = np.zeros((len(counts), N), np.float32)
    found = sparse_ternary_matmul(target, N, K)(before, w, w_scale, residual)
    return found, exact_sum(listed, w), exact_sum(q, w)


def most(target: TargetSpec) -> int:
    """Active columns from which on a row walks them all."""
    return -(-K * module("sparse_ternary_matmul", target).KNOBS["most_eighths"][0] // 8)


@pytest.mark.parametrize("target", params(WALKED))
@pytest.mark.parametrize("rows", [1, 3])
def test_the_list_is_walked_up_to_the_density_where_all_of_k_is(target, rows):
    limit = most(target)
    for count in (0, 1, K // 8, limit - 1):
        found, listed, _ = found_and_listed(target, rows * [count])
        np.testing.assert_array_equal(found, listed)
    for count in (limit, K - 1):
        found, _, everything = found_and_listed(target, rows * [count])
        np.testing.assert_array_equal(found, everything)


@pytest.mark.parametrize("target", params(WALKED))
def test_each_row_by_its_own_count(target):
    counts = [most(target), K // 8, 0, 0, most(target) - 1, 0, 1]  # too few in all for tiles
    found, listed, everything = found_and_listed(target, counts)
    is_full = np.array(counts) >= most(target)
    np.testing.assert_array_equal(found, np.where(is_full[:, None], everything, listed))


@pytest.mark.parametrize("target", params(WALKED))
def test_rows_are_tiled_from_the_density_where_tiles_pay(target):
    """amx: as soon as a tile is full. The others: by the active columns of all rows."""
    rows, knobs = 40, module("sparse_ternary_matmul", target).KNOBS
    sixteenths = knobs.get("batch_sixteenths", (0,))[0]
    for count in (K // 32, K * sixteenths // 16 - 1, K * sixteenths // 16):
        if count >= 0:
            found, listed, everything = found_and_listed(target, rows * [count])
            is_tiled = 16 * count >= K * sixteenths
            np.testing.assert_array_equal(found, everything if is_tiled else listed)
