"""Gated ternary_matmul on AVX2: rows_x86.py with codes shifted to the bottom of their bytes.

`vpmaddubsw` makes int16 sums of two products, four a half of a line; as many halves are added as
16 bits hold, and `vpmaddwd` by ones adds them to an int32. STREAMS registers of int16, as many of
int32, the mask: 16 registers.

    lines a drain | act_bits 4       | act_bits 8
    of two halves | 127: 256 * 127   | 7: 4096 * 7

|sum| <= 2 * 128 K: 32 bits hold it for K < 2**23.
"""

from functools import partial

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import avx2
from schedules.ternary_matmul import rows_x86
from schedules.ternary_matmul.rows_x86 import CHUNK, FIELDS, LINE

HALF = LINE // 2  # a register
LINES_PER_DRAIN = {bits: 0x7FFF // (2 * FIELDS * 2 * 2 * 2 ** (bits - 1)) for bits in (4, 8)}


def ones(dtype: str) -> Expr:
    return avx2.splat(dtype, 1, 32 if dtype == "uint8" else 16)


def sum_row(totals, to, qs, r):
    """totals[to] = sum of row r of qs"""
    lanes = T.alloc_buffer((1, 8), "int32")
    avx2.clear(lanes, 1, "int32", 8)
    with T.serial(int(qs.shape[1]) // HALF) as v:
        pairs = avx2.multiply_add_bytes(ones("uint8"), avx2.load(qs, r, HALF * v, lanes=HALF))
        avx2.add(lanes, 0, 0, value=avx2.multiply_add_words(pairs, ones("int16")), lanes=8)
    T.buffer_store(totals, avx2.sum_lanes(avx2.load(lanes, 0, 0, lanes=8)), [to])


def add_line(words, w, qs, r, rows, later, c):
    """words[s, 16] += what line c of each row of w adds"""
    for half in range(2):
        columns = [CHUNK * c + LINE * f + HALF * half for f in range(FIELDS)]
        activations = [avx2.load(qs, r, column, lanes=HALF) for column in columns]
        for s, row in enumerate(rows):
            bytes_ = T.Bind(avx2.load(w, row, c, HALF * half, lanes=HALF))
            for far in later[s] if half == 0 else ():
                avx2.prefetch(w, far, c, 0)
            total = avx2.load(words, s, 0, lanes=16)
            for f, signed in enumerate(activations):
                field = avx2.shift_bytes(bytes_, -2 * f)
                codes = field & avx2.splat("uint8", 3, HALF)
                total = avx2.add_words(total, avx2.multiply_add_bytes(codes, signed))
            avx2.store(words, s, 0, value=total, lanes=16)


def sums(w, qs, r, rows, later, *, act_bits: int) -> list[Expr]:
    count, lines, per_drain = len(rows), int(w.shape[1]), LINES_PER_DRAIN[act_bits]
    lanes = T.alloc_buffer((count, 8), "int32")  # registers
    words = T.alloc_buffer((count, 16), "int16")
    avx2.clear(lanes, count, "int32", 8)
    with T.serial(-(-lines // per_drain)) as d:
        avx2.clear(words, count, "int16", 16)
        with T.serial(T.min(per_drain, lines - d * per_drain)) as c:
            add_line(words, w, qs, r, rows, later, d * per_drain + c)
        for s in range(count):
            found = avx2.load(words, s, 0, lanes=16)
            avx2.add(lanes, s, 0, value=avx2.multiply_add_words(found, ones("int16")), lanes=8)
    vectors = [T.Bind(avx2.load(lanes, s, 0, lanes=8)) for s in range(count)]
    if count != 4:
        return [avx2.sum_lanes(vector) for vector in vectors]
    four = T.alloc_buffer((4,), "int32")
    pairs = [avx2.add_neighbours(*vectors[s : s + 2]) for s in (0, 2)]
    both = T.Bind(avx2.add_neighbours(*pairs))
    avx2.store(four, 0, value=sum(avx2.halves(both, "int32x4")), lanes=4)
    return [four[s] for s in range(4)]


def vectors(act_bits: int) -> rows_x86.Vectors:
    return rows_x86.Vectors(partial(sums, act_bits=act_bits), sum_row)
