"""Tables in groups: the row's bytes by an independent loop, and what quantising loses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import grouped

BITS = pytest.mark.parametrize("bits", grouped.BITS)


def random_table(n: int, groups: int, bits: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (n, 64 * groups), generator=generator).to(torch.int8)
    return codes, torch.randint(1, 64, (n, groups), generator=generator).to(torch.uint8)


@BITS
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 5), groups=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_unpack_inverts_pack(bits, n, groups, seed):
    codes, group = random_table(n, groups, bits, seed)
    packed = grouped.pack(codes, group, bits)
    assert packed.shape == (n, grouped.row_bytes(64 * groups, bits)) and packed.shape[1] % 64 == 0
    for found, expected in zip(
        grouped.unpack(packed, 64 * groups, bits), (codes, group), strict=True
    ):
        assert torch.equal(found, expected)


@BITS
def test_where_a_code_lies(bits):
    codes, group = random_table(2, 7, bits, 0)
    packed = grouped.pack(codes, group, bits)
    assert packed.shape[1] == 64 + 2 * 32 * bits
    for n in range(2):
        row = packed[n].tolist()
        for column in range(7 * 64):
            block, j = divmod(column, 256)
            line = 64 + block * 32 * bits + j % 64
            code = row[line + j // 128 * 64] >> (4 if j % 128 >= 64 else 0) & 15
            if bits == 6:
                code |= (row[line + 128] >> 2 * (j // 64) & 3) << 4
            assert code - 2 ** (bits - 1) == codes[n, column]
        assert row[:64] == group[n].tolist() + 57 * [0]


def test_bytes_of_a_row():
    """As many as K codes and their scales take, where both are whole lines."""
    assert grouped.row_bytes(2560, 6) == 64 + 2560 * 6 // 8
    assert grouped.row_bytes(4096, 4) == 64 + 4096 // 2
    assert grouped.row_bytes(4160, 4) == 128 + 4160 // 2 + 96


@pytest.mark.parametrize("bits, most", [(6, 0.03), (4, 0.12)])
def test_quantize_loses_little_of_normal_weights(bits, most):
    w = torch.randn(20, 256, generator=torch.Generator().manual_seed(0))
    w[:, :64] *= 9  # another group's size is not lost
    codes, group, scale = grouped.quantize(w, bits)
    packed = grouped.pack(codes, group, bits)
    found = grouped.levels(packed, 256, bits) * scale[:, None]
    for part in (slice(0, 64), slice(64, 256)):
        assert (found - w)[:, part].norm() / w[:, part].norm() < most


@BITS
def test_rows_of_zeros_and_of_one_number(bits):
    w = torch.tensor([[0.0], [3.0], [-1e-29]]).expand(3, 128)
    codes, group, scale = grouped.quantize(w, bits)
    found = grouped.levels(grouped.pack(codes, group, bits), 128, bits) * scale[:, None]
    assert torch.isfinite(scale).all() and not found[0].any()
    torch.testing.assert_close(found, w.float(), rtol=0.15, atol=0)


def test_quantize_does_not_see_other_rows():
    w = torch.randn(5, 64)
    together = grouped.quantize(w, 6)
    for i in range(5):
        for whole, alone in zip(together, grouped.quantize(w[i : i + 1], 6), strict=True):
            assert torch.equal(whole[i : i + 1], alone)


@pytest.mark.parametrize("k, bits", [(60, 6), (0, 6), (8384, 6), (33344, 4)])
def test_columns_that_a_row_cannot_hold(k, bits):
    assert (grouped.why_not(k, bits) is None) == (k == 0)
    if k:
        codes = torch.zeros(1, k, dtype=torch.int8)
        with pytest.raises(ValueError, match="columns are"):
            grouped.pack(codes, torch.ones(1, k // 64, dtype=torch.uint8), bits)
