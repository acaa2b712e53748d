"""The packed KV cache in torch: its layout, and the ops `bitnet::kv_append`, `bitnet::attention`.

Layout (docs/architecture.md, "KV cache"): codes [S, Hkv, 2, B] and scales f16[S, Hkv, 2, T], axis
2 = keys, values. 16 bits: codes are the float16 values themselves. 4 bits: T rows of D/2 bytes.
3 bits: position 0, the bos token, is a 4-bit row, the others are 3D/8 bytes (a4.8 section 2.2:
3-bit KV with the bos token's heads at 4 bits).
"""

import torch
from torch import Tensor
from torch.library import custom_op

from model import quantizers

BLOCK_POSITIONS = 64  # that share the unit of their probabilities
SMALLEST_UNIT = 1e-300


def code_bytes(kv_bits: int, context: int, head_dim: int) -> int:
    """Elements of the codes' last axis: bytes at 4 and 3 bits, float16 numbers at 16."""
    if kv_bits == 16:
        return context * head_dim
    if kv_bits == 4:
        return context * head_dim // 2
    return head_dim // 2 + (context - 1) * 3 * head_dim // 8


def empty_cache(
    kv_bits: int, slots: int, context: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """One layer's (codes, scales), zeroed."""
    dtype = torch.float16 if kv_bits == 16 else torch.uint8
    shape = (slots, num_kv_heads, 2)
    codes = torch.zeros(*shape, code_bytes(kv_bits, context, head_dim), dtype=dtype)
    return codes, torch.zeros(*shape, 1 if kv_bits == 16 else context, dtype=torch.float16)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes u8[..., D] -> bytes u8[..., D*bits/8], in the planes of that page."""
    d = codes.shape[-1]
    if bits == 4:
        return codes[..., : d // 2] | codes[..., d // 2 :] << 4
    low = (codes & 3).unflatten(-1, (4, d // 4))
    high = (codes >> 2).unflatten(-1, (8, d // 8))
    low_bytes = sum(low[..., f, :] << 2 * f for f in range(4))
    high_bytes = sum(high[..., f, :] << f for f in range(8))
    return torch.cat((low_bytes, high_bytes), dim=-1)


def unpack(packed: Tensor, bits: int, head_dim: int) -> Tensor:
    """Inverse of `pack`: bytes u8[..., D*bits/8] -> codes u8[..., D]."""
    if bits == 4:
        return torch.cat((packed & 15, packed >> 4), dim=-1)
    low_bytes, high_bytes = packed[..., : head_dim // 4], packed[..., head_dim // 4 :]
    low = torch.cat([low_bytes >> 2 * f & 3 for f in range(4)], dim=-1)
    high = torch.cat([high_bytes >> f & 1 for f in range(8)], dim=-1)
    return low | high << 2


def _rows(codes: Tensor, kv_bits: int, head_dim: int) -> list[tuple[int, int, Tensor]]:
    """Views of the codes by position: (first position, bits, view [S, Hkv, 2, positions, row])."""
    if kv_bits == 16:
        return [(0, 16, codes.unflatten(-1, (-1, head_dim)))]
    if kv_bits == 4:
        return [(0, 4, codes.unflatten(-1, (-1, head_dim // 2)))]
    bos = codes[..., : head_dim // 2].unflatten(-1, (1, head_dim // 2))
    rest = codes[..., head_dim // 2 :].unflatten(-1, (-1, 3 * head_dim // 8))
    return [(0, 4, bos), (1, 3, rest)]


def _levels(codes: Tensor, kv_bits: int, head_dim: int) -> Tensor:
    """One slot's signed levels, codes u8[Hkv, 2, B] at 4 or 3 bits -> f64[Hkv, 2, T, D]."""
    parts = [
        unpack(view[0], bits, head_dim).double() - quantizers.kv_qmax(bits)
        for _, bits, view in _rows(codes[None], kv_bits, head_dim)
    ]
    return torch.cat(parts, dim=2)


def dequantize(codes: Tensor, scales: Tensor, kv_bits: int, head_dim: int) -> Tensor:
    """One slot's cache, codes [Hkv, 2, B] and scales f16[Hkv, 2, T] -> f32[Hkv, 2, T, D]."""
    if kv_bits == 16:
        return codes.unflatten(-1, (-1, head_dim)).float()
    return _levels(codes, kv_bits, head_dim).float() * scales[..., None].float()


@custom_op("bitnet::kv_append", mutates_args=())
def kv_append(
    codes: Tensor,
    scales: Tensor,
    qkv: Tensor,
    slots: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    kv_bits: int,
) -> tuple[Tensor, Tensor]:
    """Quantise, pack and store the k and v heads of qkv f32[M, (Hq+2Hkv)D] at (slots[m],
    positions[m]).

    Functional here (a new cache is returned); compiled, the caller's tensors are updated in place.
    """
    codes, scales = codes.clone(), scales.clone()
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    kv = qkv.reshape(qkv.shape[0], -1, head_dim)[:, num_heads:]
    kv = kv.unflatten(1, (2, num_kv_heads)).transpose(1, 2)  # [M, Hkv, 2, D]
    for first, bits, view in _rows(codes, kv_bits, head_dim):
        here = (positions >= first) & (positions < first + view.shape[3])
        slot, position, rows = slots[here], positions[here], kv[here]
        if bits == 16:
            view[slot, :, :, position - first] = rows.half()
            continue
        quantized, scale = quantizers.kv_absmax(rows, bits)
        view[slot, :, :, position - first] = pack(quantized, bits)
        scales[slot, :, :, position] = scale.reshape(rows.shape[:-1]).half()
    return codes, scales


@kv_append.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    qkv: Tensor,
    slots: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    kv_bits: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(codes), torch.empty_like(scales)


@custom_op("bitnet::attention", mutates_args=())
def attention(
    qkv: Tensor,
    codes: Tensor,
    scales: Tensor,
    slots: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    kv_bits: int,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over positions 0..positions[m] of slots[m] -> f32[M, Hq*D].

    Grouped queries: query head h reads KV head h // (Hq / Hkv). Float64 and integers throughout,
    rounded to float32 once (see `_weighted_codes`): a last bit that differs here moves codes at
    rounding boundaries, and a4.8 amplifies that to a KL divergence of 0.01 and more.
    """
    m = qkv.shape[0]
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    group = num_heads // num_kv_heads
    q = qkv.reshape(m, -1, head_dim)[:, :num_heads].unflatten(1, (num_kv_heads, group))
    out = torch.empty_like(q)
    for slot in slots.unique():
        here = slots == slot
        seen = int(positions[here].max()) + 1
        hidden = torch.arange(seen)[None, :] > positions[here][:, None]
        cache = codes[slot], scales[slot]
        if kv_bits == 16:
            k, v = dequantize(*cache, kv_bits, head_dim)[:, :, :seen].double().unbind(1)
            scores = torch.einsum("mhgd,htd->mhgt", q[here].double(), k) * head_dim**-0.5
            scores = scores.masked_fill(hidden[:, None, None, :], float("-inf"))
            out[here] = torch.einsum("mhgt,htd->mhgd", scores.softmax(-1), v).float()
        else:
            levels = _levels(codes[slot], kv_bits, head_dim)[:, :, :seen]
            out[here] = _weighted_codes(q[here], levels, scales[slot, ..., :seen], hidden)
    return out.reshape(m, num_heads * head_dim)


def _weighted_codes(q: Tensor, levels: Tensor, scales: Tensor, hidden: Tensor) -> Tensor:
    """Attention on a quantised cache, in integers but for the softmax [D].

    q f32[M, Hkv, G, D]; levels f64[Hkv, 2, T, D], small integers; scales f16[Hkv, 2, T];
    hidden bool[M, T] -> f32[M, Hkv, G, D]. Per query head and position t:
        s_t = (q8 . k_t) * (k_scale_t * q_scale / sqrt(D)), q8 the INT8 absmax of q
        e_t = exp(s_t - max s),  w_t = e_t * v_scale_t
        p_t = rint(255 w_t / max of w over t's block of 64 positions), an unsigned byte
        y = sum over blocks of (sum_t p_t v_t) * (max of w / 255), over sum_t e_t
    """
    q8, q_scale = quantizers.int8_absmax(q)
    dots = torch.einsum("mhgd,htd->mhgt", q8.double(), levels[:, 0])
    k_scale, v_scale = scales.double().unbind(1)
    scores = dots * (k_scale[None, :, None, :] * (q_scale.double() * q.shape[-1] ** -0.5))
    scores = scores.masked_fill(hidden[:, None, None, :], float("-inf"))
    e = (scores - scores.amax(-1, keepdim=True)).exp()
    w = e * v_scale[None, :, None, :]
    blocks = torch.nn.functional.pad(w, (0, -w.shape[-1] % BLOCK_POSITIONS))
    blocks = blocks.unflatten(-1, (-1, BLOCK_POSITIONS))
    # A block of zeros is far below the largest score: its weights are zero whatever divides them.
    unit = blocks.amax(-1, keepdim=True) / 255
    p = torch.round(blocks / unit.clamp_min(SMALLEST_UNIT))
    weights = (p * unit).flatten(-2)[..., : w.shape[-1]]
    y = torch.einsum("mhgt,htd->mhgd", weights, levels[:, 1])
    return (y / e.sum(-1, keepdim=True)).float()


@attention.register_fake
def _(
    qkv: Tensor,
    codes: Tensor,
    scales: Tensor,
    slots: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    kv_bits: int,
) -> Tensor:
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    return qkv.new_empty((qkv.shape[0], num_heads * head_dim))
