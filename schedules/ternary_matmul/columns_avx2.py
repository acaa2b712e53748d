"""ternary_matmul with 8-bit activations on AVX2: codes of two columns, multiplied and added.

A block is 128 outputs, 32 bytes of a column. Bytes of two columns are interleaved, a 2-bit field
of them is 16 outputs' codes {0, 1, 2} for both columns, and `vpmaddubsw` with the pair of
activations adds code * q of both; sum(q) is taken off at the end.

    for thread in threads:                          parallel, a share of the blocks each
        M < 4:  for m in M:                         walk: a column is read once, from end to end
            for drain in columns/120:               sum32[share, 128]: L1
                for group of 8 columns in 15:       eight runs of memory, each a share long
                    for b in share:                 sum16[share, 8, 16]: L1; 8 registers within
                        for pair in 4:
                            sum16 += multiply_add(codes(pair, b), q pair)
        M >= 4: for m0 in M/TILE_M:                 tiled: a code serves `wide` rows
            qs[TILE_M, K]                           half of L2
            for b in share:                         sum32[TILE_M, 128]
                for drain in K/120:
                    codes[60, 8, 32]                L1, unpacked once for all rows of the tile
                    for rows by wide, field in 4:   8 registers of sums
                        for pair in 60:
                            sums += multiply_add(codes[pair], q pair of the row)

    tile       | value       | bound by
    60 pairs   | 60 * 512    | int16: a pair adds at most 2 * 128 * 2
    4 pairs    | 8 columns   | runs of memory at once; loads of sum16 a pair
    wide: 4    | 2 x 4 sums  | 16 registers: 8 sums, 2 codes, 4 activations
    TILE_M     | of l2_bytes | activations and sums of a tile of rows in `l2_eighths` / 8 of L2

Measured: not yet.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.columns import gather, list_length, write_columns
from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import avx2, threads
from schedules.targets import CpuTarget

BLOCK = 128  # outputs in a block of the layout
FIELDS = 4
GROUP = 4  # pairs of columns that a walk takes at once
COLUMNS = 2 * GROUP
PAIRS_PER_DRAIN = 0x7FFF // (2 * 2 * 128) // GROUP * GROUP
WIDE = 4  # rows from which on they are tiled


def padded(k: int) -> int:
    """Columns of a list of any k: whole groups of pairs."""
    return list_length(k, COLUMNS)


def codes(first, second):
    """Codes of two columns side by side, uint8x32 by [field][half]."""
    mask = T.broadcast(T.uint8(3), 32)
    sides = [
        T.Bind(side(first, second, 32)) for side in (avx2.interleave_low, avx2.interleave_high)
    ]
    for f in range(FIELDS):
        for side in sides:
            yield avx2.shift_bytes(side, -2 * f) & mask


def activation_pair(qs, *index):
    """Two neighbours of int8 in every 16 bits."""
    pair = T.reinterpret("int16", avx2.load(qs, *index, lanes=2))
    return T.reinterpret("int8x32", T.broadcast(pair, 16))


def drain(sum32, row, column, low, high):
    """sum32[row, column :][:32] += int16 sums of both halves, in the order of the outputs"""
    for j, half in enumerate((T.vectorlow, T.vectorhigh)):
        for c, words in enumerate((low, high)):
            words = T.cast(half("int16x8", words), "int32x8")
            avx2.add(sum32, row, column + 16 * j + 8 * c, value=words, lanes=8)


def clear_rows(buffer, first, rows, columns: int, dtype: str, lanes: int):
    with T.serial(rows) as i, T.serial(columns // lanes) as j:
        zero = avx2.splat(dtype, 0, lanes)
        avx2.store(buffer, first + i, lanes * j, value=zero, lanes=lanes)


def walk_group(sum16, w, columns, later, pairs, first, b):
    """sum16[b, 8, 16] += what a group of columns adds to block first + b"""
    sums = [T.Bind(avx2.load(sum16, b, 16 * v, lanes=16)) for v in range(2 * FIELDS)]
    for column in later:
        avx2.prefetch(w, column, first + b, 0)
    for p, pair in enumerate(pairs):
        bytes_ = [avx2.load(w, column, first + b, 0, lanes=32) for column in columns[2 * p :][:2]]
        for v, code in enumerate(codes(*bytes_)):
            sums[v] = T.Bind(avx2.add_words(sums[v], avx2.multiply_add_bytes(code, pair)))
    for v, value in enumerate(sums):
        avx2.store(sum16, b, 16 * v, value=value, lanes=16)


def walk(sum32, row, w, column, qs, count, first, blocks, ahead: int = 0):
    """sum32[row + b] = sums of `count` listed columns for `blocks` blocks from `first` on; the
    list goes on for `ahead` groups more, which are prefetched"""
    sum16 = T.alloc_buffer((w.shape[1], BLOCK), "int16")
    groups = T.Bind(T.ceildiv(count, COLUMNS))
    per_drain = PAIRS_PER_DRAIN // GROUP
    clear_rows(sum32, row, blocks, BLOCK, "int32", 8)
    with T.serial(T.ceildiv(groups, per_drain)) as d:
        clear_rows(sum16, 0, blocks, BLOCK, "int16", 16)
        with T.serial(T.min(per_drain, groups - d * per_drain)) as g:
            i = (d * per_drain + g) * COLUMNS
            # as int64, so that the eight addresses are computed once and not for every block
            columns = [T.Bind(T.cast(column[i + c], "int64")) for c in range(COLUMNS)]
            later = [column[i + ahead * COLUMNS + c] for c in range(COLUMNS if ahead else 0)]
            later = [T.Bind(T.cast(c, "int64")) for c in later]
            pairs = [T.Bind(activation_pair(qs, i + 2 * p)) for p in range(GROUP)]
            with T.serial(blocks) as b:
                walk_group(sum16, w, columns, later, pairs, first, b)
        with T.serial(blocks) as b:
            for f in range(FIELDS):
                low, high = (avx2.load(sum16, b, 32 * f + 16 * c, lanes=16) for c in (0, 1))
                drain(sum32, row + b, 32 * f, low, high)


def finish(output, sum32, row, total, m, b):
    """out[m] of block b from sum32[row]"""
    output.store(m, b, BLOCK, lambda j, lanes: avx2.load(sum32, row, j, lanes=lanes) - total)


def unpack_codes(unpacked, w, b, p0, pairs, k):
    """unpacked[p, 8, 32] = codes of columns 2 (p0 + p) and the next, which past K meets q = 0"""
    with T.serial(pairs) as p:
        columns = [T.min(2 * (p0 + p) + c, k - 1) for c in (0, 1)]
        bytes_ = [avx2.load(w, column, b, 0, lanes=32) for column in columns]
        for v, code in enumerate(codes(*bytes_)):
            avx2.store(unpacked, p, v, 0, value=code, lanes=32)


def tile_field(sum32, unpacked, qs, r, f, p0, pairs, wide):
    """sum32[r : r + wide, 32 f : 32 f + 32] += field f of the unpacked pairs"""
    sum16 = T.alloc_buffer((2 * wide, 16), "int16", scope="local")
    avx2.clear(sum16, 2 * wide, "int16", 16)
    with T.serial(pairs) as p:
        halves = [T.Bind(avx2.load(unpacked, p, 2 * f + c, 0, lanes=32)) for c in (0, 1)]
        for t in range(wide):
            pair = T.Bind(activation_pair(qs, r + t, 2 * (p0 + p)))
            for c in (0, 1):
                product = avx2.multiply_add_bytes(halves[c], pair)
                avx2.add(sum16, 2 * t + c, 0, value=product, lanes=16)
    for t in range(wide):
        low, high = (avx2.load(sum16, 2 * t + c, 0, lanes=16) for c in (0, 1))
        drain(sum32, r + t, 32 * f, low, high)


def copy_rows(qs, totals, q, m, rows, height, k):
    """qs[:height] = rows of q from m on, zeros past `rows` and K; totals = sums of the rows"""
    with T.serial(height) as r:
        T.buffer_store(totals, T.int32(0), [r])
        with T.serial(padded(k)) as i:
            T.buffer_store(qs, T.int8(0), [r, i])
        with T.If(r < rows), T.Then(), T.serial(k) as i:
            T.buffer_store(qs, q[m + r, i], [r, i])
            T.buffer_store(totals, totals[r] + T.cast(q[m + r, i], "int32"), [r])


def tile_block(output, w, qs, totals, unpacked, sum32, m, b, rows, height, k, wide):
    """All outputs of block b and of `height` rows from m on, of which `rows` exist"""
    pairs = -(-k // 2)
    clear_rows(sum32, 0, height, BLOCK, "int32", 8)
    with T.serial(-(-pairs // PAIRS_PER_DRAIN)) as d:
        p0 = d * PAIRS_PER_DRAIN
        some = T.Bind(T.min(PAIRS_PER_DRAIN, pairs - p0))
        unpack_codes(unpacked, w, b, p0, some, k)
        with T.serial(height // wide) as r:
            with T.serial(FIELDS) as f:
                tile_field(sum32, unpacked, qs, wide * r, f, p0, some, wide)
    with T.serial(rows) as r:
        finish(output, sum32, r, totals[r], m + r, b)


def tile_rows(output, q, w, rows, first, blocks, k, wide, near_bytes):
    """All rows of q, tile by tile, for `blocks` blocks from `first` on; a tile of rows takes
    `near_bytes` at most"""
    tile_m = max(wide, near_bytes // (padded(k) + 4 * BLOCK) // wide * wide)
    qs = T.alloc_buffer((tile_m, padded(k)), "int8")
    totals = T.alloc_buffer((tile_m,), "int32")
    unpacked = T.alloc_buffer((PAIRS_PER_DRAIN, 2 * FIELDS, 32), "uint8")
    sum32 = T.alloc_buffer((tile_m, BLOCK), "int32")
    with T.serial(T.ceildiv(rows, tile_m)) as m0:
        m = m0 * tile_m
        here = T.Bind(T.min(rows - m, tile_m))
        height = T.Bind(T.ceildiv(here, wide) * wide)
        copy_rows(qs, totals, q, m, here, height, k)
        with T.serial(blocks) as b:
            tile_block(output, w, qs, totals, unpacked, sum32, m, first + b, here, height, k, wide)


def kernel(
    n: int, k: int, target: CpuTarget, epilogue: str, *, wide: int = 4, l2_eighths: int = 4
) -> PrimFunc:
    end = EPILOGUES[epilogue]
    blocks = -(-n // BLOCK)
    near_bytes = target.l2_bytes * l2_eighths // 8
    rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((k, blocks, 32), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        output = T.meta_var(Output(end, n, scale, w_scale, extra, out))
        height = T.meta_var(T.cast(rows, "int32"))
        with T.sblock("root"):
            tasks = T.min(threads.count(), blocks)
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                share = threads.share(blocks, task + 1, tasks) - first
                if height >= WIDE:
                    tile_rows(output, q, w, height, first, share, k, wide, near_bytes)
                else:
                    column = T.alloc_buffer((padded(k),), "int32")
                    qs = T.alloc_buffer((padded(k),), "int8")
                    total = T.alloc_buffer((1,), "int32")
                    sum32 = T.alloc_buffer((blocks, BLOCK), "int32")
                    write_columns(column, k, COLUMNS, lambda i: i)
                    for m in T.serial(height):
                        gather(qs, total, q, m, column, k, COLUMNS)
                        walk(sum32, 0, w, column, qs, k, first, share)
                        for b in T.serial(share):
                            finish(output, sum32, b, total[0], m, first + b)

    return end.finish(ternary_matmul)
