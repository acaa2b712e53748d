"""Rows of a packed cache into blocks of bytes, D = 64, 128 or 256; other sizes as unpack_avx2.py.

A plane of D/p bytes holds p fields of a bit or more each, field f of byte i being column f D/p + i.
Repeated until a register is full, it is rotated by its field in each part of the register: the
fields come out side by side, 64 columns in their order (the layouts: docs/architecture.md, "KV
cache").
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.unpack import BIAS, bos_first
from schedules.attention.unpack_avx2 import byte_unpacker as narrow_unpacker
from schedules.intrin import avx2, avx512
from schedules.targets import CpuTarget

LANES = avx512.LINE
SIZES = (64, 128, 256)


def byte_unpacker(kv_bits: int, head_dim: int, target: CpuTarget):
    """As `unpacker`, for blocks of bytes."""
    if head_dim not in SIZES:
        return narrow_unpacker(kv_bits, head_dim, target)

    def nibbles_row(codes, slot, head, kv, position, block, j):
        def plane(column):
            at = position * (head_dim // 2)
            return fields(codes, (slot, head, kv), at, head_dim // 2, column, 4)

        for column in range(0, head_dim, LANES):
            store_levels(block, j, column, masked(plane(column), 15), 7)

    def planes_row(codes, slot, head, kv, base, block, j):
        of = (codes, (slot, head, kv))
        for column in range(0, head_dim, LANES):
            low = masked(fields(*of, base, head_dim // 4, column, 2), 3)
            high = fields(*of, base + head_dim // 4, head_dim // 8, column, 1, to=2)
            store_levels(block, j, column, low | masked(high, 4), 3)

    return nibbles_row if kv_bits == 4 else bos_first(head_dim, planes_row, target)


def fields(codes, row, at, size: int, column: int, bits: int, to: int = 0) -> Expr:
    """A register of columns from `column` on of a plane of `size` bytes with fields of `bits`: the
    column's field at bit `to` of its byte, other fields around it."""
    lanes = min(size, LANES)
    plane = T.bind(avx2.load(codes, *row, at + column % size // LANES * LANES, lanes=lanes))
    first = column // size
    amounts = [(bits * (first + i) - to) % 64 for i in range(LANES // lanes)]
    return avx512.rotate_right(avx512.repeat(plane), amounts)


def masked(bytes_: Expr, mask: int) -> Expr:
    return bytes_ & T.broadcast(T.uint8(mask), LANES)


def store_levels(block, j, column: int, code: Expr, qmax: int) -> None:
    """block[j, column : column + 64] = code - qmax, and BIAS more where the block is unsigned"""
    is_unsigned = str(block.dtype) == "uint8"
    level = code + T.broadcast(T.uint8((BIAS if is_unsigned else 0) - qmax & 255), LANES)
    value = level if is_unsigned else T.reinterpret("int8x64", level)
    avx2.store(block, j, column, value=value, lanes=LANES)
