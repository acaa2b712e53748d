"""The TopK mask against its definition, on a CPU; `python -m model.topk` checks the CUDA kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from model.topk import topk_mask

EXAMPLES = settings(max_examples=60, deadline=None)  # the machine may be busy
# Few values, so that most rows have ties, and both zeros, which are equal in magnitude.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-39, 3.4e38])
ROWS = st_numpy.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 24)), elements=TIED)


def definition(row: list[float], k: int) -> list[bool]:
    """The k first columns by falling |x|, then by rising index."""
    chosen = sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:k]
    return [i in chosen for i in range(len(row))]


@EXAMPLES
@given(ROWS, st.data())
def test_equals_the_definition(rows, data):
    k = data.draw(st.integers(1, rows.shape[1]))
    mask = topk_mask(torch.from_numpy(rows), k)
    assert mask.dtype == torch.bool and (mask.sum(-1) == k).all()
    assert mask.tolist() == [definition(row, k) for row in rows.tolist()]


@EXAMPLES
@given(st_numpy.arrays(np.float32, (3, 17), elements=st.floats(-1e3, 1e3, width=32)))
def test_equals_the_definition_on_any_numbers(rows):
    mask = topk_mask(torch.from_numpy(rows), 8)
    assert mask.tolist() == [definition(row, 8) for row in rows.tolist()]


def test_ties_go_to_the_lower_index():
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 2.0, -2.0, 2.0]])
    assert topk_mask(x, 2).tolist() == [[True, True, False, False], [False, True, True, False]]


def test_one_and_all():
    x = torch.tensor([[0.5, -3.0, 3.0]])
    assert topk_mask(x, 1).tolist() == [[False, True, False]]
    assert topk_mask(x, 3).all()


def test_leading_dimensions_are_kept():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    mask = topk_mask(x, 3)
    assert mask.shape == x.shape
    assert torch.equal(mask[1, 2], topk_mask(x[1, 2], 3))


@pytest.mark.parametrize("k", [0, 5, -1])
def test_a_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"k {k} is out of range for rows of 4; has 1 to 4"):
        topk_mask(torch.zeros(1, 4), k)
