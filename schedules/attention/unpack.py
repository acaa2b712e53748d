"""Rows of the packed KV cache, one row of D codes at a time, to the block's dtype; no scales yet.

unpacker(kv_bits, ...) gives row(codes, slot, head, kv, position, block, j), which writes into
block[j, :D] code - qmax, or the float16 values themselves at 16 bits; a block of uint8 holds
code - qmax + BIAS. The layout is in docs/architecture.md, "KV cache".
"""

from tvm.script import tirx as T

from schedules.intrin.vector import each, store
from schedules.targets import CpuTarget

BIAS = 7  # of unsigned levels: the largest qmax, as a 3-bit cache has a 4-bit row


def unpacker(kv_bits: int, head_dim: int, target: CpuTarget):
    assert kv_bits == 16 or head_dim % 8 == 0, f"head_dim {head_dim} is no multiple of 8"
    return {16: _halves, 4: _nibbles, 3: _planes}[kv_bits](head_dim, target)


def _halves(head_dim: int, target: CpuTarget):
    def row(codes, slot, head, kv, position, block, j):
        def widen(i, lane):
            half = codes[slot, head, kv, position * head_dim + i]
            store(block, (j, i), T.cast(T.cast(half, "float32"), block.dtype))

        each(head_dim, target.lanes(32), widen)

    return row


def _nibbles(head_dim: int, target: CpuTarget):
    half = head_dim // 2

    def row(codes, slot, head, kv, position, block, j):
        def split(i, lane):
            byte = T.bind(codes[slot, head, kv, position * half + i])
            store(block, (j, i), centred(byte & T.uint8(15), 7, block.dtype))
            store(block, (j, half + i), centred(byte >> T.uint8(4), 7, block.dtype))

        each(half, target.lanes(8), split)

    return row


def _planes(head_dim: int, target: CpuTarget):
    plane = head_dim // 8

    def planes_row(codes, slot, head, kv, base, block, j):
        def join(i, lane):
            # The low bits of the even planes, those of the odd ones, the high bits of all eight.
            *low, high = (T.bind(codes[slot, head, kv, base + b * plane + i]) for b in range(3))
            for f in range(8):
                low_bits = low[f % 2] >> T.uint8(f // 2 * 2) & T.uint8(3)
                high_bit = (high >> T.uint8(f) & T.uint8(1)) << T.uint8(2)
                store(block, (j, f * plane + i), centred(low_bits | high_bit, 3, block.dtype))

        each(plane, target.lanes(8), join)

    return bos_first(head_dim, planes_row, target)


def bos_first(head_dim: int, planes_row, target: CpuTarget):
    """3 bits, planes_row(..., base, ...), but for the bos row, which is one of nibbles."""
    bos_row = _nibbles(head_dim, target)

    def row(codes, slot, head, kv, position, block, j):
        with T.If(position == 0):
            with T.Then():
                bos_row(codes, slot, head, kv, position, block, j)
            with T.Else():
                base = T.bind(head_dim // 2 + (position - 1) * (3 * head_dim // 8))
                planes_row(codes, slot, head, kv, base, block, j)

    return row


def centred(code, qmax: int, dtype: str):
    if str(dtype) == "uint8":
        return code + T.uint8(BIAS - qmax)
    return T.cast(T.cast(code, "int8") - T.int8(qmax), dtype)
