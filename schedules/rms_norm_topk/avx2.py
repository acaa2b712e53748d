"""rms_norm_topk_int8 on AVX2: generic.py, whose list takes 8 columns at a time, by a table.

    table[mask, 8] = places of the ones of mask     2 KB, written for each row
    for i in K/32:
        masks = which of q[m, 32 i ...] are not 0
        for j in 4:                                 8 bits of masks, 8 columns
            index[m, count : count + 8] = 32 i + 8 j + table[mask]      8 lanes stored
            count += ones of mask

`pext` in place of the table was no quicker, and is microcoded on Zen 1 and 2; a table of 4 columns
at a time was slower.
Measured: Zen 4, 2 cores, 2026-11-23, one row, medians of interleaved calls, us: 2560 columns, 1280
kept, 2.38; 6912 at 84 % zeros, all kept, 2.58 (the list one column at a time 4.56).
"""

from functools import partial

from tvm.script import tirx as T

from schedules.intrin import avx2
from schedules.rms_norm_topk import generic

LANES = 8  # columns, and int32 of a register
CODES = 32  # in a register
WORDS = 2  # int32 of an entry of the table, 4 places each


def list_first(q, index, found, m, k: int) -> int:
    if k < CODES:
        return 0
    table = T.alloc_buffer((2**LANES * WORDS,), "int32")
    words = [word for mask in range(2**LANES) for word in places(mask)]
    for at in range(0, len(words), LANES):
        eight = avx2.constant("int32", words[at : at + LANES])
        avx2.store(table, at, value=eight, lanes=LANES)
    with T.serial(k // CODES) as i:
        codes = avx2.load(q, m, CODES * i, lanes=CODES)
        masks = T.Bind(avx2.nonzero_bytes(codes))
        for first in range(0, CODES, LANES):
            mask = T.Bind(masks >> first & 2**LANES - 1)
            entry = avx2.load(table, WORDS * mask, lanes=WORDS)
            columns = T.cast(T.reinterpret(f"uint8x{LANES}", entry), f"int32x{LANES}")
            columns = columns + T.broadcast(CODES * i + first, LANES)
            avx2.store(index, m, found[0], value=columns, lanes=LANES)
            avx2.store(found, 0, value=found[0] + T.popcount(mask), lanes=1)
    return k // CODES * CODES


def places(mask: int) -> list[int]:
    """Places of the ones of 8 bits, a byte each, rising, then zeros, as two words"""
    ones = bytes(place for place in range(LANES) if mask >> place & 1).ljust(LANES, b"\0")
    return [int.from_bytes(ones[at : at + 4], "little") for at in range(0, LANES, 4)]


kernel = partial(generic.kernel, list_first=list_first)
