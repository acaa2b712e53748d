"""Tables of 6- or 4-bit codes in groups: the head, and the embedding where it is tied to it.

    w[n, k] = code[n, k] * group[n, k // 64] * scale[n]

`group` is an integer in 1..63, so that a sum over k is exact in int32 whatever its order; only
scale[n] is a float, applied once at the end. llama.cpp's Q6_K and Q4_K have integer group scales
for the same reason, over 16 and 32 columns.

A packed row, uint8, K a multiple of 64, code' = code + 2**(bits - 1), is one line of 64 bytes or
more for the group scales and then, for every block of 256 columns, two lines or three. Byte j of
a line holds code'[64f + j] of the block's groups f < 4, those past K 0:

    line   | holds
    first  | group, zeros up to a multiple of 64
    0, 1   | (code'[128h + j] & 15) | (code'[128h + 64 + j] & 15) << 4 in line h
    2      | at 6 bits: sum over f < 4 of (code'[64f + j] >> 4) << 2f

So a row is read from end to end by one pointer, whole lines at a time, scales first, and a shift
and a mask leave a register of 64, 32 or 16 bytes in the order of the columns.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 64  # columns that share a group scale
MAX_GROUP_SCALE = 63
LINE = 64  # a packed row is a multiple of as many bytes
BLOCK = 4 * GROUP  # columns of two or three lines
BITS = (6, 4)
TABLE_BITS = (8, *BITS)  # 8: INT8 rows, which are not grouped
SEARCH = tuple(i / 16 for i in range(9, 18))  # of a group scale that clips nothing
ROWS = 8192  # quantised at once
SMALLEST = 1e-30  # largest |w| of a row that is not taken for zero


def row_bytes(k: int, bits: int) -> int:
    """Bytes of a packed row of k codes."""
    return LINE * (-(-k // GROUP // LINE) + -(-k // BLOCK) * bits // 2)


def largest_k(bits: int) -> int:
    """Columns whose products with int8 surely add up within int32."""
    return (2**31 - 1) // (128 * 2 ** (bits - 1) * MAX_GROUP_SCALE)


def why_not(k: int, bits: int) -> str | None:
    """Why rows of k columns cannot be stored so."""
    if k % GROUP:
        return f"{k} columns are no multiple of {GROUP}"
    if k > largest_k(bits):
        return f"{k} columns are more than {largest_k(bits)}, which int32 sums hold"
    return None


def quantize(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """w f32[N, K] -> codes i8[N, K], group u8[N, K/64], scale f32[N].

    Of the group scales in SEARCH times the one that clips nothing, that of the least squared error.
    """
    parts = [_quantize(rows.float(), bits) for rows in w.split(ROWS)]
    codes, group, scale = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, group, scale


def _quantize(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    scale = w.abs().amax(-1).clamp_min(SMALLEST) / (top * MAX_GROUP_SCALE)
    blocks = (w / scale[:, None]).reshape(len(w), -1, GROUP)
    whole = blocks.abs().amax(-1) / top  # the group scale that clips nothing

    def coded(group: Tensor) -> Tensor:
        return (blocks / group[..., None]).round_().clamp_(-top - 1, top)

    best = torch.full_like(whole, MAX_GROUP_SCALE)
    least = torch.full_like(whole, torch.inf)
    for share in SEARCH:
        group = (whole * share).round_().clamp_(1, MAX_GROUP_SCALE)
        error = (coded(group) * group[..., None] - blocks).square_().sum(-1)
        best = torch.where(error < least, group, best)
        least = torch.minimum(error, least)
    return coded(best).reshape(w.shape).to(torch.int8), best.to(torch.uint8), scale


def pack(codes: Tensor, group: Tensor, bits: int) -> Tensor:
    """codes i8[N, K], group u8[N, K/64] -> u8[N, row_bytes]."""
    n, k = codes.shape
    blocks = -(-k // BLOCK)
    if problem := why_not(k, bits):
        raise ValueError(f"grouped: {problem}")
    code = (codes + 2 ** (bits - 1)).to(torch.uint8)
    code = pad(code, (0, blocks * BLOCK - k)).reshape(n, blocks, 4, GROUP)
    low = code & 15
    lines = [low[:, :, h] | low[:, :, h + 1] << 4 for h in (0, 2)]
    if bits == 6:
        high = [code[:, :, f] >> 4 << 2 * f for f in range(4)]
        lines.append(high[0] | high[1] | high[2] | high[3])
    scales = pad(group, (0, -(k // GROUP) % LINE))
    return torch.cat([scales, torch.stack(lines, dim=2).reshape(n, -1)], dim=1)


def unpack(packed: Tensor, k: int, bits: int) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`."""
    n, blocks = packed.shape[0], -(-k // BLOCK)
    lines = packed.reshape(n, -1, LINE)[:, -(blocks * bits // 2) :].reshape(n, blocks, -1, LINE)
    code = torch.stack([lines[:, :, f // 2] >> f % 2 * 4 & 15 for f in range(4)], dim=2)
    if bits == 6:
        code |= torch.stack([(lines[:, :, 2] >> 2 * f & 3) << 4 for f in range(4)], dim=2)
    codes = code.reshape(n, -1)[:, :k].to(torch.int8) - 2 ** (bits - 1)
    return codes, packed[:, : k // GROUP]


def levels(packed: Tensor, k: int, bits: int) -> Tensor:
    """code * group i32[N, K]: the integers that `scale` multiplies."""
    codes, group = unpack(packed, k, bits)
    blocks = codes.reshape(len(codes), -1, GROUP).int() * group[..., None].int()
    return blocks.reshape(codes.shape)
