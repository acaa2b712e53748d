"""Rows of 6- or 4-bit codes in groups, as grouped_matmul and grouped_embedding read them.

    w[n, k] = code[n, k] * group[n, k // 64] * scale[n]         code' = code + 2**(bits - 1)

    bytes of a row  | hold, for a group g of 64 columns
    K/2             | byte 32g + j: code'[j] & 15 | (code'[32 + j] & 15) << 4
    K/4, at 6 bits  | byte 16g + j: sum over f < 4 of (code'[16f + j] >> 4) << 2f
    K/64            | group, 1..63
    up to 64x       | zeros

One layout for every machine, written by model/grouped.py, which says why it is so. With 16, 32 or
64 bytes a register, the codes of a group come out in the order of their columns.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

GROUP = 64
LINE = 64
BITS = (6, 4)
MAX_GROUP_SCALE = 63


def row_bytes(k: int, bits: int) -> int:
    """Bytes of a row of k columns."""
    return -(-(scales_at(k, bits) + k // GROUP) // LINE) * LINE


def scales_at(k: int, bits: int) -> int:
    """The byte of a row where its groups' scales begin."""
    return k * bits // 8


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
    low = T.shift_right(T.cast(w[n, 32 * group + j % 32], "int32"), j // 32 * 4) & 15
    if bits == 6:
        high = T.cast(w[n, k // 2 + 16 * group + j % 16], "int32")
        low = low | (T.shift_right(high, j // 16 * 2) & 3) << 4
    return low - offset(bits)


def group_scale(w, n, k: int, bits: int, group) -> Expr:
    """group[n, group] as int32"""
    return T.cast(w[n, scales_at(k, bits) + group], "int32")
