"""3-bit rows whose low bits fill a register or half of one: D = 128 and 64; else as `unpack`.

The layout is that of docs/architecture.md, "KV cache"; i counts the lanes of a register.

    low  D/4 bytes:  bits 2f..2f+1 of byte i are the low bits of code f * D/4 + i
    high D/8 bytes:  twice side by side, the second shifted right by one: bit 2f is now the high
                     bit of code f * D/4 + i, so one field of both is D/4 codes in their order
"""

from tvm.script import tirx as T

from schedules.attention.unpack import BIAS, bos_first, unpacker
from schedules.intrin import avx2
from schedules.targets import CpuTarget

QMAX = 3
LANES = (16, 32)  # of low bytes


def byte_unpacker(kv_bits: int, head_dim: int, target: CpuTarget):
    """As `unpacker`, for blocks of bytes."""
    if kv_bits != 3 or head_dim // 4 not in LANES:
        return unpacker(kv_bits, head_dim, target)
    lanes = head_dim // 4

    def planes_row(codes, slot, head, kv, base, block, j):
        low = T.bind(avx2.load(codes, slot, head, kv, base, lanes=lanes))
        high = T.bind(_high_bits(codes, slot, head, kv, base + lanes, lanes))
        for f in range(4):
            code = _shifted(low, 2 * f, 3, lanes) | _shifted(high, 2 * f - 2, 4, lanes)
            if str(block.dtype) == "uint8":
                level = code + T.broadcast(T.uint8(BIAS - QMAX), lanes)
            else:
                level = T.reinterpret(f"int8x{lanes}", code - T.broadcast(T.uint8(QMAX), lanes))
            avx2.store(block, j, f * lanes, value=level, lanes=lanes)

    return bos_first(head_dim, planes_row, target)


def _high_bits(codes, slot, head, kv, base, lanes: int):
    bytes_ = T.bind(avx2.load(codes, slot, head, kv, base, lanes=lanes // 2))
    both = T.reinterpret(f"uint32x{lanes // 4}", T.vectorcombine(f"uint8x{lanes}", bytes_, bytes_))
    shifts = [4 * i // (lanes // 2) for i in range(lanes // 4)]
    return T.reinterpret(f"uint8x{lanes}", T.shift_right(both, avx2.constant("uint32", shifts)))


def _shifted(bytes_, right: int, mask: int, lanes: int):
    """bytes_ >> right & mask, left if `right` is negative: bits of the other byte are masked."""
    if right:
        words = T.reinterpret(f"uint16x{lanes // 2}", bytes_)
        shift = T.shift_right if right > 0 else T.shift_left
        words = shift(words, T.broadcast(T.uint16(abs(right)), lanes // 2))
        bytes_ = T.reinterpret(f"uint8x{lanes}", words)
    return bytes_ & T.broadcast(T.uint8(mask), lanes)
