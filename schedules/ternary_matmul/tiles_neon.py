"""Many rows of int8 by unpacked ternary weights on NEON: what the layouts' kernels share.

A block is 32 outputs. Its weights are unpacked chunk by chunk of K, as int8 and in the order that
the multiplying instruction takes them, and serve all rows of a tile; a `Form` is an instruction.

    qs[TILE_M, K]                               zeros past K; half of L2, each thread its own
    for m0 in M/TILE_M, b in share:
        for k0 in K/CHUNK:                      sum32[TILE_M, 32]
            codes[CHUNK, 32]                    half of L1
            for rows by R, outputs by J:        16 registers of sums
                sums += codes . qs

    form  | R x J  | instruction            | products each, instructions a product with loads
    DOT   | 4 x 16 | sdot (dotprod)         | 16, 0.07
    PAIRS | 8 x 8  | smmla (i8mm)           | 32, 0.05
    LONG  | 4 x 32 | smlal, smlal2          | 8, 0.17; sums of int16, drained every 124 columns
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T

from schedules.intrin import neon
from schedules.intrin.lanes import add, clear, load, splat, store
from schedules.targets import CpuTarget

BLOCK = 32  # outputs whose weights are unpacked at once
STEP = 16  # columns whose activations fill a register
# wide: rows from which weights are unpacked; l1_eighths, l2_eighths: of the target's caches
KNOBS = {"wide": (2, 3, 4), "l1_eighths": (4, 2, 8), "l2_eighths": (4, 2, 8)}
COLUMNS_PER_DRAIN = 124  # of codes up to 2: 2 * 128 * 124 < 2**15, whole quads


@dataclass(frozen=True)
class Form:
    """How unpacked weights are multiplied.

    Registers of 16 bytes, codes[p, 8, 16] for columns 4p .. 4p + 3 of the block:
    by_quads: register v is outputs 4v .. 4v + 3, four columns of each
    pairs: registers 2j, 2j + 1 are outputs 4j .. 4j + 3 in pairs, eight columns of each; p even
        has the first half of the block, p + 1 the second, for the columns of both
    neither: registers 2c, 2c + 1 are all outputs of column c
    """

    rows: int  # of activations that a tile takes at once
    outputs: int  # of a block
    by_quads: bool = True
    has_pairs: bool = False
    bias: int = 0  # what codes are above the weights


DOT = Form(rows=4, outputs=16)
PAIRS = Form(rows=8, outputs=8, has_pairs=True)
LONG = Form(rows=4, outputs=32, by_quads=False, bias=1)


def padded(k: int) -> int:
    return -(-k // STEP) * STEP


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles of a shape on a target."""

    form: Form
    k: int
    chunk: int  # quads
    tile_m: int

    @staticmethod
    def of(form: Form, k: int, target: CpuTarget, l1_eighths: int, l2_eighths: int) -> "Tiles":
        chunk = target.l1d_bytes * l1_eighths // 8 // (4 * BLOCK) // 4 * 4
        room = target.l2_bytes * l2_eighths // 8 // (padded(k) + 4 * BLOCK)
        tile_m = max(form.rows, room // form.rows * form.rows)
        return Tiles(form, k, max(4, min(chunk, padded(k) // 4)), tile_m)


def store_pairs(codes, pair, h: int, sides) -> None:
    """The registers of half h of the block for quads 2 pair and 2 pair + 1, a list of four by quads
    each, in pairs."""
    for v, quads in enumerate(zip(*sides, strict=True)):
        words = [T.Bind(T.reinterpret("int32x4", quad)) for quad in quads]
        for z in (0, 1):
            both = T.reinterpret("int8x16", neon.zip_lanes(words[0], words[1], z))
            at = 8 * h + 2 * v + z
            store(codes, 2 * pair + at // 8, at % 8, 0, value=both, lanes=16)


def dot_tile(sum32, codes, qs, r, g, k0, quads):
    """sum32[r : r + 4, 16 g : 16 g + 16] += codes . qs[r : r + 4, k0 : k0 + 4 quads]"""
    rows, vectors = DOT.rows, DOT.outputs // 4
    sums = T.alloc_buffer((rows * vectors, 4), "int32", scope="local")
    clear(sums, rows * vectors, "int32", 4)
    with T.serial(quads // 4) as step:
        found = [T.Bind(load(sums, i, 0, lanes=4)) for i in range(rows * vectors)]
        activations = [
            T.Bind(T.reinterpret("int32x4", load(qs, r + t, k0 + STEP * step, lanes=STEP)))
            for t in range(rows)
        ]
        for p in range(4):
            weights = [
                T.Bind(load(codes, 4 * step + p, vectors * g + v, 0, lanes=16))
                for v in range(vectors)
            ]
            for t in range(rows):
                for v in range(vectors):
                    at, quad = vectors * t + v, neon.quad(activations[t], p)
                    found[at] = T.Bind(neon.dot(found[at], weights[v], quad))
        for i, value in enumerate(found):
            store(sums, i, 0, value=value, lanes=4)
    for t in range(rows):
        for v in range(vectors):
            value = load(sums, vectors * t + v, 0, lanes=4)
            add(sum32, r + t, DOT.outputs * g + 4 * v, value=value, lanes=4)


def pair_tile(sum32, codes, qs, r, g, k0, quads):
    """sum32[r : r + 8, 8 g : 8 g + 8] += codes . rows r .. r + 7 of qs, which stand in pairs"""
    pairs, vectors = PAIRS.rows // 2, PAIRS.outputs // 2
    sums = T.alloc_buffer((pairs * vectors, 4), "int32", scope="local")
    clear(sums, pairs * vectors, "int32", 4)
    with T.serial(quads // 2) as step:
        activations = [
            T.Bind(load(qs, r // 2 + t, 2 * k0 + 16 * step, lanes=16)) for t in range(pairs)
        ]
        for v in range(vectors):
            at = vectors * g + v
            weights = T.Bind(load(codes, 2 * step + at // 8, at % 8, 0, lanes=16))
            for t in range(pairs):
                i = vectors * t + v
                found = neon.multiply_pairs(load(sums, i, 0, lanes=4), activations[t], weights)
                store(sums, i, 0, value=found, lanes=4)
    for t in range(pairs):
        for v in range(vectors):
            value = T.Bind(load(sums, vectors * t + v, 0, lanes=4))
            for i, half in enumerate(neon.halves(value, "int32x2")):
                add(sum32, r + 2 * t + i, PAIRS.outputs * g + 2 * v, value=half, lanes=2)


def long_tile(sum32, codes, qs, r, g, k0, quads):
    """sum32[r : r + 4, :32] += codes . qs[r : r + 4, k0 : k0 + 4 quads]"""
    rows, vectors = LONG.rows, BLOCK // 8
    sums = T.alloc_buffer((rows * vectors, 8), "int16", scope="local")
    per_drain = COLUMNS_PER_DRAIN // 4
    with T.serial(T.ceildiv(quads, per_drain)) as d:
        clear(sums, rows * vectors, "int16", 8)
        with T.serial(T.min(per_drain, quads - d * per_drain)) as p:
            quad = d * per_drain + p
            for c in range(4):
                loaded = [T.Bind(load(codes, quad, 2 * c + h, 0, lanes=16)) for h in (0, 1)]
                weights = [half for code in loaded for half in neon.halves(code, "int8x8")]
                for t in range(rows):
                    q = T.Bind(T.broadcast(qs[r + t, k0 + 4 * quad + c], 8))
                    for v, eight in enumerate(weights):
                        product = neon.multiply_long(eight, q)
                        add(sums, vectors * t + v, 0, value=product, lanes=8)
        for t in range(rows):
            for v in range(vectors):
                value = T.cast(load(sums, vectors * t + v, 0, lanes=8), "int32x8")
                add(sum32, r + t, 8 * v, value=value, lanes=8)


def copy_rows(qs, q, m, rows, height, k, form: Form):
    """qs[:height] = rows of q from m on, zeros past `rows` and K. With pairs, row 2j + i, column
    8c + d is qs[j, 16 c + 8 i + d]."""

    def put(r, i, value, lanes):
        at = (r // 2, i // 8 * 16 + r % 2 * 8 + i % 8) if form.has_pairs else (r, i)
        store(qs, *at, value=value, lanes=lanes)

    with T.serial(height) as r:
        with T.If(r < rows):
            with T.Then():
                with T.serial(k // 8) as c:
                    put(r, 8 * c, load(q, m + r, 8 * c, lanes=8), 8)
                with T.serial(k % 8) as i:
                    put(r, k // 8 * 8 + i, q[m + r, k // 8 * 8 + i], 1)
                with T.serial(padded(k) - k) as i:
                    put(r, k + i, T.int8(0), 1)
            with T.Else(), T.serial(padded(k) // 8) as c:
                put(r, 8 * c, splat("int8", 0, 8), 8)


def sum_rows(total, q, m, rows, k):
    """total[:rows] = sums of the rows of q from m on"""
    with T.serial(rows) as r:
        T.buffer_store(total, T.int32(0), [r])
        with T.serial(k) as i:
            T.buffer_store(total, total[r] + T.cast(q[m + r, i], "int32"), [r])


def tile_of(form: Form) -> Callable:
    if form.has_pairs:
        return pair_tile
    return dot_tile if form.by_quads else long_tile


def tile_block(output, unpack, qs, total, codes, sum32, m, b, rows, height, tiles: Tiles):
    """Outputs 32 b .. 32 b + 31 for `height` rows from m on, of which `rows` exist;
    unpack(codes, b, p0, quads) unpacks the block's weights"""
    form, quads = tiles.form, padded(tiles.k) // 4
    with T.serial(height) as r:
        for j in range(0, BLOCK, 8):
            store(sum32, r, j, value=splat("int32", 0, 8), lanes=8)
    with T.serial(-(-quads // tiles.chunk)) as c:
        p0 = c * tiles.chunk
        some = T.Bind(T.min(tiles.chunk, quads - p0))
        unpack(codes, b, p0, some)
        with T.serial(height // form.rows) as r, T.serial(BLOCK // form.outputs) as g:
            tile_of(form)(sum32, codes, qs, form.rows * r, g, 4 * p0, some)
    with T.serial(rows) as r:

        def sums(j, lanes):
            found = load(sum32, r, j, lanes=lanes)
            return found - total[r] if form.bias else found

        output.store(m + r, b, BLOCK, sums)


def tile_rows(output, unpack, q, rows, first, last, tiles: Tiles):
    """All rows of q, tile by tile, for the blocks of 32 outputs from `first` to `last`"""
    form, k, tile_m = tiles.form, tiles.k, tiles.tile_m
    pair = 2 if form.has_pairs else 1
    qs = T.alloc_buffer((tile_m // pair, pair * padded(k)), "int8")
    total = T.alloc_buffer((tile_m,), "int32")
    codes = T.alloc_buffer((tiles.chunk, BLOCK // 4, 16), "int8")
    sum32 = T.alloc_buffer((tile_m, BLOCK), "int32")
    with T.serial(T.ceildiv(rows, tile_m)) as m0:
        m = m0 * tile_m
        here = T.Bind(T.min(rows - m, tile_m))
        tall = T.Bind(T.ceildiv(here, form.rows) * form.rows)
        copy_rows(qs, q, m, here, tall, k, form)
        if form.bias:
            sum_rows(total, q, m, here, k)
        with T.serial(last - first) as b:
            tile_block(
                output, unpack, qs, total, codes, sum32, m, first + b, here, tall, tiles
            )  # fmt: skip
