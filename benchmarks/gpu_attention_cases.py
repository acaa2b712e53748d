"""Rotation, cache and attention for benchmarks/gpu.py, at the sizes of BitNet b1.58 2B4T."""

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.gpu_case import Case, empty, floats, int8

HEADS = (20, 5, 128)  # queries, keys, size


def rope(m: int) -> Case:
    heads, kv_heads, dim = HEADS
    positions = 4096

    def inputs():
        at = torch.randint(0, positions, (m,), device="cuda")
        tables = floats(positions, dim // 2), floats(positions, dim // 2)
        qkv = floats(m, (heads + 2 * kv_heads) * dim)
        return [qkv, *tables, at, empty(*qkv.shape)]

    def expected(arrays):
        qkv, cos, sin, at, _ = arrays
        x = qkv.reshape(m, -1, dim).double()
        low, high = x.chunk(2, dim=-1)
        c, s = cos[at][:, None].double(), sin[at][:, None].double()
        turned = torch.cat([low * c - high * s, high * c + low * s], -1)
        rotated = torch.arange(heads + 2 * kv_heads, device="cuda") < heads + kv_heads
        return [torch.where(rotated[:, None], turned, x).float().reshape(m, -1)]

    args = heads, kv_heads, dim, positions
    return Case("rows", f"rope M={m}", "rope", args, inputs, 1, expected)


def levels(codes: torch.Tensor) -> torch.Tensor:
    """A 3-bit cache u8[S, Hkv, 2, B] -> f64[S, Hkv, 2, T, D]."""
    dim = HEADS[2]
    bos, rest = codes[..., : dim // 2], codes[..., dim // 2 :]
    bos = torch.cat([bos & 15, bos >> 4], -1)[..., None, :].double() - 7
    rest = rest.reshape(*rest.shape[:-1], -1, 3 * dim // 8)
    low, high = rest[..., : dim // 4], rest[..., dim // 4 :]
    code = torch.cat([low >> 2 * f & 3 for f in range(4)], -1)
    code = code | torch.cat([high >> f & 1 for f in range(8)], -1) << 2
    return torch.cat([bos, code.double() - 3], -2)


def attention(m: int, context: int) -> Case:
    """m rows of one slot, the last of them at the context's end; keys and values at 3 bits."""
    heads, kv_heads, dim = HEADS
    size = dim // 2 + (context - 1) * 3 * dim // 8

    def inputs():
        codes = torch.randint(0, 256, (1, kv_heads, 2, size), dtype=torch.uint8, device="cuda")
        scales = torch.rand(1, kv_heads, 2, context, device="cuda").half() / 4
        at = torch.arange(context - m, context, device="cuda")
        qkv = floats(m, (heads + 2 * kv_heads) * dim)
        return [qkv, codes, scales, torch.zeros_like(at), at, empty(m, heads * dim)]

    def expected(arrays):
        qkv, codes, scales, _, at, found = arrays
        q = qkv[:, : heads * dim].reshape(m, heads, dim).swapaxes(0, 1)
        q8, q_scale = (part.reshape(heads, m, -1).double() for part in int8(q.reshape(-1, dim)))
        kv = levels(codes)[0].repeat_interleave(heads // kv_heads, 0)
        scale = scales[0].double().repeat_interleave(heads // kv_heads, 0)
        dots = q8 @ kv[:, 0].mT
        scores = dots * scale[:, None, 0] * q_scale / np.sqrt(dim)
        scores.masked_fill_(torch.arange(context, device="cuda") > at[:, None], -torch.inf)
        e = (scores - scores.amax(-1, keepdim=True)).exp()
        total, y = e.sum(-1, keepdim=True), 0
        for t in range(0, context, 64):
            w = e[..., t : t + 64] * scale[:, None, 1, t : t + 64]
            unit = w.amax(-1, keepdim=True) / 255
            p = (w / torch.where(unit > 0, unit, 1)).round()
            y = y + unit * (p @ kv[:, 1, t : t + 64])
        y = (y / total).float().swapaxes(0, 1).reshape(m, heads * dim)
        # exp and the float64 sums are free in their last bits: so is one ulp in ten thousand here
        near = (y.view(torch.int32) - found.view(torch.int32)).abs() <= 1
        assert (y != found).sum() <= y.numel() / 10_000, f"{(y != found).sum()} elements differ"
        return [torch.where(near, found, y)]

    name = f"attention M={m} context {context}, 3 bits"
    case = Case("attention", name, "attention", (*HEADS, 3), inputs, 1, expected)
    case.cold, case.rivals = (1, 2), {"SDPA bf16": scaled_dot_product(m, context)}
    return case


def scaled_dot_product(m: int, context: int) -> Callable:
    heads, kv_heads, dim = HEADS
    sizes = (1, heads, m, dim), (1, kv_heads, context, dim), (1, kv_heads, context, dim)
    state: list[torch.Tensor] = []

    def call(_):
        if not state:
            state.extend(floats(*size).bfloat16() for size in sizes)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*state, is_causal=m == context, enable_gqa=True)

    return call


def append(m: int) -> Case:
    """Checked through the cache: levels times scales are within half a step of the values."""
    heads, kv_heads, dim = HEADS
    size = dim // 2 + (4096 - 1) * 3 * dim // 8

    def inputs():
        at = torch.arange(m, device="cuda")
        qkv = floats(m, (heads + 2 * kv_heads) * dim)
        codes = torch.zeros((1, kv_heads, 2, size), dtype=torch.uint8, device="cuda")
        scales = torch.zeros((1, kv_heads, 2, 4096), dtype=torch.float16, device="cuda")
        return [codes, scales, qkv, torch.zeros_like(at), at]

    def expected(arrays):
        codes, scales, qkv = arrays[:3]
        x = qkv[:, heads * dim :].reshape(m, 2, kv_heads, dim).permute(2, 1, 0, 3).double()
        scale = scales[0, :, :, :m].double()[..., None]
        error = (levels(codes)[0, :, :, :m] * scale - x).abs()
        assert (error <= 0.51 * scale).all()
        return []

    return Case("rows", f"kv_append M={m}, 3 bits", "kv_append", (*HEADS, 3), inputs, 0, expected)
