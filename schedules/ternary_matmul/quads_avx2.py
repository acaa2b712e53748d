"""Ungated ternary_matmul with 8-bit activations on AVX2 and AVX-VNNI: codes {0, 1, 2} of four
columns times four activations, outputs in lanes; sum(q) is taken off at the end.

A line of the layout is four columns of 64 outputs, in two registers. A field of a register is the
codes of 8 outputs, of which `vpmaddubsw` makes int16 sums of two products that are added, or
`vpdpbusd` adds four products to an int32.

    for thread in threads:                              parallel, a share of the blocks each
        qs[TILE_M, 4Q] = rows of q                      zeros behind K
        M < 4:  for m in M, j in share/STREAMS:         streams far apart, each one long run
                    for visit in Q/16, stream:          1 KB of a stream at a time
                        for quad in 16:                 8 registers of sums
                            sums[v] += dot(w[j + stream share/STREAMS, quad] field v, qs[quad])
                        sums32[stream] += sums          L1
        M >= 4: for b in share:
                    for chunk in Q/64:
                        codes[64, 8, 32] = w[b, chunk]  16 KB, L1
                        for rows of the tile by WIDE, 8/WIDE vectors of codes:
                            for quad in chunk:          8 registers of sums
                                sums[r, v] += dot(codes[quad, v], qs[r, quad])
                            sums32[rows] += sums        64 outputs a row: L1

    tile     | value       | bound by
    visit    | 16 quads    | int16: a field of codes {0, 4, 8} is not shifted, to -2048 an addition
    chunk    | 64 quads    | int16: down to -512 an addition, -2**15 in all; L1
    STREAMS  | 4           | the memory's prefetchers: knob
    PREFETCH | 2048        | bytes ahead in a stream, over the end of a page: knob
    WIDE     | 4           | 16 registers: 8 sums, 6 operands: knob
    TILE_M   | 64          | unpacking costs what a row costs; sums32 is 16 KB, L1

|sum| <= 64 * 2 * 128 K: 32 bits hold it for K < 2**17.

Measured: Sapphire Rapids class Xeon, 2 busy cores, one thread, 2026-11-22, 2560 x 6912, CPU time,
medians of interleaved calls, as a share of the time of the walk over columns that this replaces.
One token, cold: `vpmaddubsw` 0.45 (0.75-0.8 of a streaming read), `vpdpbusd` 0.42 (0.85); five
tokens 0.47, 0.33; 128 tokens 0.67, 0.44, which is 110 and 170 G op/s where a loop of `vpmaddubsw`
and `vpaddsw` in L1 alone had 112. 8 streams took 0.97 of 4's time, 1 stream 1.05; half a visit
1.03.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import avx2, threads
from schedules.layouts import num_quads
from schedules.ternary_matmul.rows_avx2 import sum_row
from schedules.ternary_matmul.rows_x86 import copy_row

LAYOUT = "quads_2bit"
BLOCK = 64  # outputs in a block of the layout
LINE = 64  # bytes
HALF = 32  # a register
FIELDS = 4
VECTORS = 2 * FIELDS  # registers of 8 outputs
VISIT = 16  # quads; the layout has a whole number of visits
CHUNK = 64  # quads
TILE_M = 64  # rows
UNPACK_ROWS = 4  # from here on codes are unpacked for all rows of a tile
SUMS = 8  # registers of them


@dataclass(frozen=True)
class Products:
    """What an instruction set does."""

    dtype: str  # of sums in a register
    dot: Callable[[Expr, Expr, Expr], Expr]  # (sums, codes, four activations repeated) -> sums
    widen: Callable[[Expr], Expr]  # sums -> int32x8
    fields: Callable[[Expr], list[Expr]]  # bytes -> their four fields, multiplied by
    shifts: tuple[int, ...]  # two to the power of these

    @property
    def lanes(self) -> int:
        return 8 * HALF // int(self.dtype.removeprefix("int"))


def masked(bytes_: Expr, field: int) -> Expr:
    return bytes_ & T.broadcast(T.uint8(3 << 2 * field), HALF)


def fields_by_one_shift(bytes_: Expr) -> list[Expr]:
    high = T.Bind(avx2.shift_bytes(bytes_, -4))
    return [masked(half, field) for half in (bytes_, high) for field in (0, 1)]


MULTIPLY_ADD = Products(
    "int16",
    lambda sums, codes, four: avx2.add_words(sums, avx2.multiply_add_bytes(codes, four)),
    lambda sums: avx2.multiply_add_words(sums, avx2.splat("int16", 1, 16)),
    fields_by_one_shift,
    (0, 2, 0, 2),
)
DOT = Products(
    "int32",
    avx2.dot_bytes,
    lambda sums: sums,
    lambda bytes_: [masked(bytes_, field) for field in range(FIELDS)],
    (0, 2, 4, 6),
)


def quad_of(qs, *index) -> Expr:
    """Four neighbours from an index on in every 32 bits"""
    four = T.reinterpret("int32", avx2.load(qs, *index, lanes=4))
    return T.reinterpret("int8x32", T.broadcast(four, 8))


def visit(sums32, s, w, b, quad0, qs, r, products: Products, prefetch: int):
    """sums32[s] += what VISIT quads add to block b, every field times its power of two"""
    lanes = products.lanes
    sums = T.alloc_buffer((VECTORS, lanes), products.dtype)  # registers
    avx2.clear(sums, VECTORS, products.dtype, lanes)
    with T.serial(VISIT) as i:
        quad = quad0 + i
        four = T.Bind(quad_of(qs, r, 4 * quad))
        for far in avx2.ask_at(prefetch, LINE):
            avx2.prefetch(w, b, quad + far // LINE, 0)
        for half in range(2):
            bytes_ = T.Bind(avx2.load(w, b, quad, HALF * half, lanes=HALF))
            for f, codes in enumerate(products.fields(bytes_)):
                v = 2 * f + half
                total = products.dot(avx2.load(sums, v, 0, lanes=lanes), codes, four)
                avx2.store(sums, v, 0, value=total, lanes=lanes)
    for v in range(VECTORS):
        total = products.widen(avx2.load(sums, v, 0, lanes=lanes))
        avx2.add(sums32, s, 8 * v, value=total, lanes=8)


def walk(output, w, qs, sums32, r, total, m, b, step, streams: int, products, prefetch: int):
    """out[m] of blocks b, b + step, ...; qs[r] is the row"""
    with T.serial(streams) as s:
        clear_row(sums32, s)
    with T.serial(w.shape[1] // VISIT) as g, T.serial(streams) as s:
        visit(sums32, s, w, b + s * step, VISIT * g, qs, r, products, prefetch)
    with T.serial(streams) as s:
        for v in range(VECTORS):
            shift = T.broadcast(products.shifts[v // 2], 8)
            unscaled = T.shift_right(avx2.load(sums32, s, 8 * v, lanes=8), shift)
            avx2.store(sums32, s, 8 * v, value=unscaled, lanes=8)
        finish(output, sums32, s, total, m, b + s * step)


def clear_row(sums32, row):
    for v in range(int(sums32.shape[1]) // 8):
        avx2.store(sums32, row, 8 * v, value=avx2.splat("int32", 0, 8), lanes=8)


def finish(output, sums32, row, total, m, b):
    """out[m] of block b from sums32[row]"""
    block = int(sums32.shape[1])
    output.store(m, b, block, lambda j, lanes: avx2.load(sums32, row, j, lanes=lanes) - total)


def one_row(output, w, qs, sums32, r, total, m, first, share, products, streams, prefetch):
    """out[m] for `share` blocks from `first` on; qs[r] is the row"""
    run = T.Bind(share // streams)
    with T.serial(run) as j:
        walk(output, w, qs, sums32, r, total, m, first + j, run, streams, products, prefetch)
    if streams > 1:
        with T.serial(share % streams) as j:
            b = first + streams * run + j
            walk(output, w, qs, sums32, r, total, m, b, 0, 1, products, prefetch)


def unpack(codes, w, b, quad0, quads):
    """codes[:quads, 8, 32] = block b's from a quad on"""
    with T.serial(quads) as i, T.serial(2) as half:
        bytes_ = T.Bind(avx2.load(w, b, quad0 + i, HALF * half, lanes=HALF))
        for f in range(FIELDS):
            field = masked(avx2.shift_bytes(bytes_, -2 * f), 0)
            avx2.store(codes, i, 2 * f + half, 0, value=field, lanes=HALF)


def drain_in_order(sums32, row, v, value):
    """sums32[row] += int32 sums of vector v's 8 outputs"""
    avx2.add(sums32, row, 8 * v, value=value, lanes=8)


def tile(sums32, codes, qs, r, first, quad0, quads, products: Products, wide: int, drain):
    """sums32[r : r + wide] += what `quads` quads of 8 / wide vectors of codes add"""
    lanes, vectors = products.lanes, SUMS // wide
    sums = T.alloc_buffer((SUMS, lanes), products.dtype)  # registers
    avx2.clear(sums, SUMS, products.dtype, lanes)
    with T.serial(quads) as i:
        operands = [T.Bind(avx2.load(codes, i, first + v, 0, lanes=HALF)) for v in range(vectors)]
        for t in range(wide):
            four = T.Bind(quad_of(qs, r + t, 4 * (quad0 + i)))
            for v, operand in enumerate(operands):
                at = vectors * t + v
                total = products.dot(avx2.load(sums, at, 0, lanes=lanes), operand, four)
                avx2.store(sums, at, 0, value=total, lanes=lanes)
    for t in range(wide):
        for v in range(vectors):
            total = products.widen(avx2.load(sums, vectors * t + v, 0, lanes=lanes))
            drain(sums32, r + t, first + v, total)


def multiply_chunk(sums32, codes, qs, height, quad0, quads, products: Products, wide: int, drain):
    """sums32[:height] += what the unpacked `quads` quads from quad0 on add"""
    vectors = int(codes.shape[1])
    with T.serial(height // wide) as r, T.serial(vectors * wide // SUMS) as i:
        first = i * (SUMS // wide)
        tile(sums32, codes, qs, wide * r, first, quad0, quads, products, wide, drain)
    if wide > 1:
        with T.serial(height % wide) as r, T.serial(vectors // SUMS) as i:
            tile(sums32, codes, qs, height - 1 - r, SUMS * i, quad0, quads, products, 1, drain)


def many_rows(output, w, qs, totals, codes, sums32, m, height, b, products, wide: int):
    """out[m : m + height] of block b"""
    quads = int(w.shape[1])
    with T.serial(height) as r:
        clear_row(sums32, r)
    with T.serial(-(-quads // CHUNK)) as c:
        some = T.Bind(T.min(CHUNK, quads - CHUNK * c))
        unpack(codes, w, b, CHUNK * c, some)
        multiply_chunk(sums32, codes, qs, height, CHUNK * c, some, products, wide, drain_in_order)
    with T.serial(height) as r:
        finish(output, sums32, r, totals[r], m + r, b)


def kernel(
    n: int,
    k: int,
    epilogue: str,
    products: Products,
    *,
    streams: int,
    prefetch: int,
    wide: int,
) -> PrimFunc:
    end = EPILOGUES[epilogue]
    blocks, quads = -(-n // BLOCK), num_quads(k)
    num_rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((num_rows, k), "int8"),
        scale: T.Buffer((num_rows,), "float32"),
        w: T.Buffer((blocks, quads, LINE), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((num_rows, n), "float32"),
        out: T.Buffer((num_rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, extra, out))
        with T.sblock("root"):
            tasks = T.min(threads.count(), blocks)
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                share = threads.share(blocks, task + 1, tasks) - first
                qs = T.alloc_buffer((TILE_M, 4 * quads), "int8")
                totals = T.alloc_buffer((TILE_M,), "int32")
                codes = T.alloc_buffer((CHUNK, VECTORS, HALF), "uint8")
                sums32 = T.alloc_buffer((TILE_M, BLOCK), "int32")
                for tile_index in T.serial(T.ceildiv(T.cast(num_rows, "int32"), TILE_M)):
                    m = T.meta_var(tile_index * TILE_M)
                    height = T.min(T.cast(num_rows, "int32") - m, TILE_M)
                    for r in T.serial(height):
                        copy_row(qs, r, q, m + r, k)
                        sum_row(totals, r, qs, r)
                    if height < UNPACK_ROWS:
                        for r in T.serial(height):
                            one_row(
                                output, w, qs, sums32, r, totals[r], m + r, first, share,
                                products, streams, prefetch,
                            )  # fmt: skip
                    else:
                        for b in T.serial(share):
                            many_rows(
                                output, w, qs, totals, codes, sums32, m, height, first + b,
                                products, wide,
                            )  # fmt: skip

    return end.finish(ternary_matmul)
