"""The KV cache in numpy, element by element, for the tests of kv_append and attention."""

import numpy as np

F32 = np.float32


def empty(kv_bits, slots, context, kv_heads, dim, fill=0):
    """(codes, scales) of one layer, filled."""
    size = {16: context * dim, 4: context * dim // 2}.get(
        kv_bits, dim // 2 + (context - 1) * 3 * dim // 8
    )
    codes = np.full((slots, kv_heads, 2, size), fill, np.float16 if kv_bits == 16 else np.uint8)
    return codes, np.full((slots, kv_heads, 2, 1 if kv_bits == 16 else context), fill, np.float16)


def quantize(x, bits):
    """x f32[..., D] -> unsigned codes and float16 scales [...]."""
    qmax = F32(2 ** (bits - 1) - 1)
    ratio = np.minimum(np.abs(x).max(axis=-1) / qmax, F32(65504))
    scale = np.maximum(ratio.astype(np.float16), np.float16(2**-14))
    q = np.rint(x / scale[..., None].astype(F32))
    return (np.clip(q, -qmax, qmax) + qmax).astype(np.uint8), scale


def fields(bits, dim):
    """(element, byte, shift in the byte, shift in the code, width) of each field of a row."""
    if bits == 4:
        return [(i, i % (dim // 2), 4 * (i // (dim // 2)), 0, 4) for i in range(dim)]
    low = [(i, i % (dim // 4), 2 * (i // (dim // 4)), 0, 2) for i in range(dim)]
    return low + [(i, dim // 4 + i % (dim // 8), i // (dim // 8), 2, 1) for i in range(dim)]


def pack(code, bits):
    packed = np.zeros((*code.shape[:-1], code.shape[-1] * bits // 8), np.uint8)
    for i, byte, at, start, width in fields(bits, code.shape[-1]):
        packed[..., byte] |= (code[..., i] >> start & (1 << width) - 1) << at
    return packed


def unpack(packed, bits, dim):
    code = np.zeros((*packed.shape[:-1], dim), np.uint8)
    for i, byte, at, start, width in fields(bits, dim):
        code[..., i] |= (packed[..., byte] >> at & (1 << width) - 1) << start
    return code


def row(kv_bits, position, dim):
    """(bits, first, last byte) of a position."""
    if kv_bits == 3 and position > 0:
        first = dim // 2 + (position - 1) * 3 * dim // 8
        return 3, first, first + 3 * dim // 8
    return 4, position * dim // 2, (position + 1) * dim // 2


def append(codes, scales, qkv, slots, positions, heads, kv_heads, kv_bits):
    """In place."""
    dim = qkv.shape[1] // (heads + 2 * kv_heads)
    new = qkv[:, heads * dim :].reshape(-1, 2, kv_heads, dim).swapaxes(1, 2)
    if kv_bits == 16:
        with np.errstate(over="ignore"):
            for slot, position, x in zip(slots, positions, new.astype(np.float16), strict=True):
                codes[slot, :, :, position * dim : (position + 1) * dim] = x
        return
    quantized = {bits: quantize(new, bits) for bits in (3, 4)}
    packed = {bits: pack(code, bits) for bits, (code, _) in quantized.items()}
    for m, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        bits, first, last = row(kv_bits, position, dim)
        codes[slot, :, :, first:last] = packed[bits][m]
        scales[slot, :, :, position] = quantized[bits][1][m]


def levels(codes, kv_bits, dim):
    """One slot's codes -> f64[Hkv, 2, T, D]: the float16 values at 16 bits, else code - qmax."""
    if kv_bits == 16:
        return codes.reshape(*codes.shape[:2], -1, dim).astype(np.float64)
    first = 1 if kv_bits == 3 else 0  # position of the first row of kv_bits
    bos, rest = np.split(codes, [first * dim // 2], axis=-1)
    parts = [
        unpack(part.reshape(*codes.shape[:2], -1, dim * bits // 8), bits, dim).astype(np.float64)
        - (2 ** (bits - 1) - 1)
        for part, bits in ((bos, 4), (rest, kv_bits))
        if part.shape[-1]
    ]
    return np.concatenate(parts, axis=2)
