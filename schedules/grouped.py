"""Rows of 6- or 4-bit codes in groups, as grouped_matmul and grouped_embedding read them.

    w[n, k] = code[n, k] * group[n, k // 64] * scale[n]         code' = code + 2**(bits - 1)

    lines of a row of 64 bytes | byte j, for the groups f < 4 of a block of 256 columns
    ceil(K/64 / 64)            | group, 1..63; zeros behind them
    per block: 2               | line h: (code'[128h + j] & 15) | (code'[128h + 64 + j] & 15) << 4
    1 more at 6 bits           | sum over f of (code'[64f + j] >> 4) << 2f

One layout for every machine, written by model/grouped.py, which says why it is so.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

GROUP = 64
LINE = 64
BLOCK = 4 * GROUP
BITS = (6, 4)
MAX_GROUP_SCALE = 63


def row_bytes(k: int, bits: int) -> int:
    """Bytes of a row of k columns."""
    return blocks_at(k) + -(-k // BLOCK) * block_bytes(bits)


def blocks_at(k: int) -> int:
    """The byte of a row where its blocks begin, behind the scales."""
    return -(-k // GROUP // LINE) * LINE


def block_bytes(bits: int) -> int:
    return BLOCK * bits // 8


def offset(bits: int) -> int:
    """code' - code"""
    return 2 ** (bits - 1)


def why_not(k: int, bits: int) -> str | None:
    """Why a row of k columns cannot be stored so."""
    most = (2**31 - 1) // (128 * offset(bits) * MAX_GROUP_SCALE)
    if k % GROUP:
        return f"K is {k}, expected a multiple of {GROUP}"
    return f"K is {k}, int32 sums hold {most} columns at {bits} bits" if k > most else None


def code(w, n, k: int, bits: int, group, j) -> Expr:
    """code[n, 64 group + j] as int32, j an index within the group"""
    at, f = blocks_at(k) + group // 4 * block_bytes(bits) + j, group % 4
    low = T.shift_right(T.cast(w[n, at + f // 2 * LINE], "int32"), f % 2 * 4) & 15
    if bits == 6:
        high = T.cast(w[n, at + 2 * LINE], "int32")
        low = low | (T.shift_right(high, f * 2) & 3) << 4
    return low - offset(bits)


def group_scale(w, n, group) -> Expr:
    """group[n, group] as int32"""
    return T.cast(w[n, group], "int32")
