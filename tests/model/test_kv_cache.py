"""The packed KV cache: its bytes by an independent loop, what goes in comes out, its attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import kv_cache, quantizers

EXAMPLES = settings(max_examples=40, deadline=None)
HEADS, KV_HEADS = 4, 2


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv_rows(m: int, head_dim: int, seed: int = 0) -> torch.Tensor:
    return gaussian(m, (HEADS + 2 * KV_HEADS) * head_dim, seed=seed)


def kv_of(qkv: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[M, Hkv, 2, D]: keys and values of each row."""
    heads = qkv.reshape(len(qkv), -1, head_dim)
    return torch.stack([heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]], dim=2)


@st.composite
def codes_and_bits(draw):
    bits = draw(st.sampled_from([3, 4]))
    head_dim = draw(st.integers(1, 8)) * 8
    codes = st.lists(st.integers(0, 2**bits - 1), min_size=head_dim, max_size=head_dim)
    rows = draw(st.lists(codes, min_size=1, max_size=3))
    return torch.tensor(rows, dtype=torch.uint8), bits


@EXAMPLES
@given(codes_and_bits())
def test_unpack_inverts_pack(case):
    codes, bits = case
    packed = kv_cache.pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape[-1] == codes.shape[-1] * bits // 8
    assert torch.equal(kv_cache.unpack(packed, bits, codes.shape[-1]), codes)


@EXAMPLES
@given(codes_and_bits())
def test_bytes_are_those_of_the_page(case):
    """docs/architecture.md, "KV cache", as loops over single codes."""
    codes, bits = case
    for row, packed in zip(codes.tolist(), kv_cache.pack(codes, bits).tolist(), strict=True):
        d = len(row)
        if bits == 4:
            assert packed == [row[j] | row[j + d // 2] << 4 for j in range(d // 2)]
            continue
        low = [sum((row[j + f * d // 4] & 3) << 2 * f for f in range(4)) for j in range(d // 4)]
        high = [sum((row[j + f * d // 8] >> 2) << f for f in range(8)) for j in range(d // 8)]
        assert packed == low + high


@pytest.mark.parametrize(
    ("bits", "length"), [(16, 5 * 64), (4, 5 * 32), (3, 32 + 4 * 24)], ids=["16", "4", "3"]
)
def test_sizes(bits, length):
    codes, scales = kv_cache.empty_cache(bits, slots=2, context=5, num_kv_heads=3, head_dim=64)
    assert codes.shape == (2, 3, 2, length) and scales.shape == (2, 3, 2, 1 if bits == 16 else 5)
    assert codes.dtype == (torch.float16 if bits == 16 else torch.uint8)
    assert scales.dtype == torch.float16 and not codes.any() and not scales.any()


def test_a_context_of_one_is_the_bos_row_alone():
    assert kv_cache.code_bytes(3, 1, 64) == kv_cache.code_bytes(4, 1, 64) == 32


@pytest.mark.parametrize("bits", [16, 4, 3])
def test_append_stores_each_row_at_its_slot_and_position(bits):
    """Byte by byte: every row at the offset that the page gives it, the rest of the cache kept."""
    d, context, slots, positions = 16, 6, [2, 0, 2, 1], [0, 0, 1, 4]
    qkv = qkv_rows(4, d)
    before = kv_cache.empty_cache(bits, 3, context, KV_HEADS, d)
    before[0].fill_(9)
    before[1].fill_(0.5)
    given_codes, given_scales = (tensor.clone() for tensor in before)
    codes, scales = kv_cache.kv_append(
        *before, qkv, torch.tensor(slots), torch.tensor(positions), HEADS, KV_HEADS, bits
    )
    assert torch.equal(before[0], given_codes) and torch.equal(before[1], given_scales)
    expected_codes, expected_scales = given_codes.clone(), given_scales.clone()
    for m, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        for head in range(KV_HEADS):
            for kind in (0, 1):
                row = kv_of(qkv, d)[m, head, kind]
                target = expected_codes[slot, head, kind]
                if bits == 16:
                    target[position * d : (position + 1) * d] = row.half()
                    continue
                own = 4 if position == 0 else bits  # the bos row keeps 4 bits
                first = d // 2 if bits == 3 else 0
                start = position * d // 2 if bits == 4 else first + (position - 1) * 3 * d // 8
                start = 0 if position == 0 else start
                quantized, scale = quantizers.kv_absmax(row, own)
                packed = kv_cache.pack(quantized, own)
                target[start : start + len(packed)] = packed
                expected_scales[slot, head, kind, position] = scale.half()
    assert torch.equal(codes, expected_codes) and torch.equal(scales, expected_scales)


@pytest.mark.parametrize("bits", [16, 4, 3])
def test_what_is_appended_comes_back_within_half_a_step(bits):
    d, n = 32, 7
    qkv = qkv_rows(n, d, seed=1)
    cache = kv_cache.empty_cache(bits, 1, n, KV_HEADS, d)
    codes, scales = kv_cache.kv_append(
        *cache, qkv, torch.zeros(n, dtype=torch.int64), torch.arange(n), HEADS, KV_HEADS, bits
    )
    found = kv_cache.dequantize(codes[0], scales[0], bits, d)  # [Hkv, 2, T, D]
    wanted = kv_of(qkv, d).permute(1, 2, 0, 3)
    error = (found - wanted).abs().amax(-1)
    amax = wanted.abs().amax(-1)
    if bits == 16:
        assert (error <= amax * 2**-11).all()
        return
    # Half a step, and what the fp16 scale (2^-11 of it, qmax times) cuts off the largest.
    qmax = torch.tensor([7.0] + [float(quantizers.kv_qmax(bits))] * (n - 1))
    assert (error <= amax / qmax * 0.5 * 1.001 + amax * 2**-11).all()
    if bits == 3:  # the bos row would miss a 4-bit step's bound at 3 bits
        assert (error[..., 1:] > amax[..., 1:] / 7 * 0.51).any()


def filled(bits: int, d: int, lengths: list[int], context: int) -> tuple:
    """qkv rows, slots, positions and cache of sequences of these lengths, one slot each."""
    slots = torch.cat([torch.full((n,), slot) for slot, n in enumerate(lengths)])
    positions = torch.cat([torch.arange(n) for n in lengths])
    qkv = qkv_rows(len(slots), d, seed=2)
    cache = kv_cache.empty_cache(bits, len(lengths), context, KV_HEADS, d)
    cache = kv_cache.kv_append(*cache, qkv, slots, positions, HEADS, KV_HEADS, bits)
    return qkv, slots, positions, cache


def softmax_attention(q, k, v) -> torch.Tensor:
    weight = torch.exp(k @ q / math.sqrt(len(q)))
    return (weight / weight.sum()) @ v


def integer_attention(q, k, v, scales) -> torch.Tensor:
    """One query head over one slot, as docs/architecture.md writes it, position by position.

    q f32[D]; k, v signed levels [T, D]; scales [2, T]; all numbers python floats but the vectors.
    """
    (q8,), ((q_scale,),) = quantizers.int8_absmax(q[None])
    q_scale = q_scale.item()
    s = [
        int(q8.long() @ k[t].long()) * scales[0, t].item() * q_scale / math.sqrt(len(q))
        for t in range(len(k))
    ]
    e = [math.exp(score - max(s)) for score in s]
    w = [e[t] * scales[1, t].item() for t in range(len(k))]
    y = torch.zeros(len(q), dtype=torch.float64)
    for first in range(0, len(k), 64):
        block = range(first, min(first + 64, len(k)))
        unit = max(w[t] for t in block) / 255
        y += unit * sum(round(w[t] / unit) * v[t].double() for t in block)
    return y / sum(e)


@pytest.mark.parametrize("bits", [16, 4, 3])
def test_attention_is_that_of_the_page_over_the_slots_own_past(bits):
    """The rows end inside the first, on the edge of the second and inside the third block of 64;
    asked for in any order, and of both slots."""
    d = 16
    qkv, slots, positions, cache = filled(bits, d, [150, 3], 160)
    rows = torch.tensor([149, 1, 152, 127, 64, 0])
    arguments = qkv[rows], *cache, slots[rows], positions[rows], HEADS, KV_HEADS, bits
    out = kv_cache.attention(*arguments).reshape(-1, HEADS, d)
    for i, m in enumerate(rows.tolist()):
        slot, seen = slots[m], int(positions[m]) + 1
        values = kv_cache.dequantize(cache[0][slot], cache[1][slot], bits, d)[:, :, :seen]
        scales = cache[1][slot, :, :, :seen].double()
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            q, (k, v) = qkv[m].reshape(-1, d)[head], values[kv_head].double()
            if bits == 16:
                expected = softmax_attention(q.double(), k, v)
            else:
                k, v = (values[kv_head].double() / scales[kv_head, ..., None]).round()
                expected = integer_attention(q, k, v, scales[kv_head])
            assert torch.allclose(out[i, head].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 3])
def test_integer_attention_is_near_softmax(bits):
    """q moves by half of 1/127 of its maximum, each weight by half of 1/255 of the block's largest:
    per cents of the result at the most, which is a mean over 100 positions."""
    d = 64
    qkv, slots, positions, cache = filled(bits, d, [100], 100)
    out = kv_cache.attention(qkv, *cache, slots, positions, HEADS, KV_HEADS, bits)
    values = kv_cache.dequantize(cache[0][0], cache[1][0], bits, d).double()
    for head in range(HEADS):
        k, v = values[head // (HEADS // KV_HEADS)]
        expected = softmax_attention(qkv[99].reshape(-1, d)[head].double(), k, v)
        error = (out[99].reshape(HEADS, d)[head].double() - expected).norm() / expected.norm()
        assert 1e-5 < error < 0.03
