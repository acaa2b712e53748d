"""ternary_matmul by columns on NEON: a walk over listed columns, all of them or the active ones.

A block is 128 outputs, 32 bytes of a column. One row of activations reads eight listed columns at a
time from end to end of a thread's share; sums lie in L1 between two groups of columns.

    for thread in threads:                          parallel, a share of the blocks each
        for m in M:                                 walk
            for group of 8 columns in list:         eight runs of memory, each a share long
                for b in share, half in 2:          16 bytes a column: 64 outputs
                    sums[64] += codes . q           16 (8) registers

    form | a column's 64 codes                          | sums
    DOT  | four columns zipped by bytes: 8 zips, then a | int32, fields 1 and 2 four and sixteen
         | mask (a shift) and an sdot a register        | times too large until the end
    LONG | a shift and a mask a field, smlal, smlal2    | int16, drained every 120 columns

Codes are w + 1; the sum of the activations is taken off at the end. 16 * 2 * 128 K holds in int32
for K < 2**19. Many rows are tiled (tiles_neon.py). Counted: docs/log.md.
"""

from functools import partial

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.columns import gather, list_length, write_columns
from schedules.epilogue import EPILOGUES, Output
from schedules.intrin import neon, threads
from schedules.intrin.lanes import add, load, splat, store
from schedules.targets import CpuTarget
from schedules.ternary_matmul import tiles_neon
from schedules.ternary_matmul.tiles_neon import LONG, Form, Tiles, tile_rows

BLOCK = 128  # outputs in a block of the layout
FIELDS = 4
GROUP = 8  # columns that a walk takes at once
GROUPS_PER_DRAIN = 0x7FFF // (2 * 128) // GROUP
SCALES = (0, 2, 4, 0)  # a field's sums of the form DOT are shifted left by


def padded(k: int) -> int:
    """Columns of a list of any k: whole groups."""
    return list_length(k, GROUP)


def clear_rows(buffer, first, rows, columns: int, dtype: str):
    with T.serial(rows) as i, T.serial(columns // 8) as j:
        store(buffer, first + i, 8 * j, value=splat(dtype, 0, 8), lanes=8)


def scaled_field(bytes_, f: int):
    """The codes of field f, shifted left by SCALES[f], as int8x16"""
    if f == 3:
        return T.reinterpret("int8x16", T.shift_right(bytes_, splat("uint8", 6, 16)))
    return T.reinterpret("int8x16", bytes_ & splat("uint8", 3 << 2 * f, 16))


def dot_group(sum32, row, w, columns, quads, first, b, h):
    """sum32[row + b] += what a group of columns adds to half h of the fields of block first + b"""
    at = [(32 * f + 16 * h + 4 * v, f, v) for f in range(FIELDS) for v in range(4)]
    sums = {(f, v): T.Bind(load(sum32, row + b, j, lanes=4)) for j, f, v in at}
    for c in range(0, GROUP, 4):
        bytes_ = [
            T.Bind(load(w, column, first + b, 16 * h, lanes=16)) for column in columns[c:][:4]
        ]
        for v, rows in enumerate(neon.transpose(bytes_)):
            for f in range(FIELDS):
                sums[f, v] = T.Bind(neon.dot(sums[f, v], scaled_field(rows, f), quads[c // 4]))
    for j, f, v in at:
        store(sum32, row + b, j, value=sums[f, v], lanes=4)


def long_group(sum16, w, columns, eights, first, b, h):
    """sum16[b] += the same, unscaled"""
    at = [(32 * f + 16 * h + 8 * z, f, z) for f in range(FIELDS) for z in (0, 1)]
    sums = {(f, z): T.Bind(load(sum16, b, j, lanes=8)) for j, f, z in at}
    for c, column in enumerate(columns):
        bytes_ = T.Bind(load(w, column, first + b, 16 * h, lanes=16))
        for f in range(FIELDS):
            shifted = T.shift_right(bytes_, splat("uint8", 2 * f, 16)) if f else bytes_
            code = T.Bind(shifted if f == 3 else shifted & splat("uint8", 3, 16))
            for z, half in enumerate(neon.halves(T.reinterpret("int8x16", code), "int8x8")):
                sums[f, z] = T.Bind(sums[f, z] + neon.multiply_long(half, eights[c]))
    for j, f, z in at:
        store(sum16, b, j, value=sums[f, z], lanes=8)


def quads_of(qs, i):
    """int8x16 of four activations over and over, for each quad of a group"""
    for c in range(0, GROUP, 4):
        quad = T.Bind(T.reinterpret("int32", load(qs, i + c, lanes=4)))
        yield T.Bind(T.reinterpret("int8x16", T.broadcast(quad, 4)))


def eights_of(qs, i):
    """int8x8 of each activation of a group"""
    return [T.Bind(T.broadcast(qs[i + c], 8)) for c in range(GROUP)]


def for_groups(column, qs, first_group, groups, blocks, spread, body):
    """body(columns, spread(qs, i), b, h) for every group of listed columns, block and half"""
    with T.serial(groups) as g:
        i = T.Bind((first_group + g) * GROUP)
        # as int64, so that the addresses are computed once and not for every block
        columns = [T.Bind(T.cast(column[i + c], "int64")) for c in range(GROUP)]
        activations = [*spread(qs, i)]
        with T.serial(blocks) as b:
            for h in (0, 1):
                body(columns, activations, b, h)


def walk(sum32, row, w, column, qs, count, first, blocks, form: Form):
    """sum32[row + b] = sums of `count` listed columns for `blocks` blocks from `first` on"""
    groups = T.ceildiv(count, GROUP)
    clear_rows(sum32, row, blocks, BLOCK, "int32")
    if form is not LONG:
        for_groups(
            column, qs, 0, groups, blocks, quads_of,
            lambda columns, quads, b, h: dot_group(sum32, row, w, columns, quads, first, b, h),
        )  # fmt: skip
        with T.serial(blocks) as b:
            for j in range(32, 96, 4):
                scale, found = splat("int32", SCALES[j // 32], 4), load(sum32, row + b, j, lanes=4)
                store(sum32, row + b, j, value=T.shift_right(found, scale), lanes=4)
        return
    sum16 = T.alloc_buffer((w.shape[1], BLOCK), "int16")
    with T.serial(T.ceildiv(groups, GROUPS_PER_DRAIN)) as d:
        done = T.Bind(d * GROUPS_PER_DRAIN)
        clear_rows(sum16, 0, blocks, BLOCK, "int16")
        for_groups(
            column, qs, done, T.min(GROUPS_PER_DRAIN, groups - done), blocks, eights_of,
            lambda columns, eights, b, h: long_group(sum16, w, columns, eights, first, b, h),
        )  # fmt: skip
        with T.serial(blocks) as b, T.serial(BLOCK // 8) as j:
            words = T.cast(load(sum16, b, 8 * j, lanes=8), "int32x8")
            add(sum32, row + b, 8 * j, value=words, lanes=8)


def finish(output, sum32, row, total, m, b):
    """out[m] of block b from sum32[row]"""
    output.store(m, b, BLOCK, lambda j, lanes: load(sum32, row, j, lanes=lanes) - total)


def unpack(w, k: int, form: Form, codes, b, p0, quads):
    """codes[:quads] = weights of the 32 outputs b from quad p0 on, as `Form` says; columns past K
    meet zero activations"""
    block, shift = T.Bind(b // FIELDS), T.Bind(T.cast(b % FIELDS * 2, "uint8"))

    def bytes_of(column, h):
        bytes_ = load(w, T.min(column, k - 1), block, 16 * h, lanes=16)
        return T.Bind(T.shift_right(bytes_, T.broadcast(shift, 16)) & splat("uint8", 3, 16))

    def signed(code):
        return T.reinterpret("int8x16", code) - splat("int8", 1 - form.bias, 16)

    def quad_of(p, h):
        return [signed(v) for v in neon.transpose([bytes_of(4 * p + c, h) for c in range(4)])]

    if not form.by_quads:
        with T.serial(quads) as p:
            for c in range(4):
                for h in (0, 1):
                    code = signed(bytes_of(4 * (p0 + p) + c, h))
                    store(codes, p, 2 * c + h, 0, value=code, lanes=16)
        return
    if not form.has_pairs:
        with T.serial(quads) as p:
            for h in (0, 1):
                for v, code in enumerate(quad_of(p0 + p, h)):
                    store(codes, p, 4 * h + v, 0, value=code, lanes=16)
        return
    with T.serial(quads // 2) as pair:
        for h in (0, 1):
            sides = [quad_of(p0 + 2 * pair + side, h) for side in (0, 1)]
            tiles_neon.store_pairs(codes, pair, h, sides)


def kernel(
    n: int,
    k: int,
    target: CpuTarget,
    epilogue: str,
    form: Form,
    *,
    wide: int = 2,
    l1_eighths: int = 4,
    l2_eighths: int = 4,
) -> PrimFunc:
    """ternary_matmul: every column is listed."""
    end = EPILOGUES[epilogue]
    blocks, small_blocks = -(-n // BLOCK), -(-n // tiles_neon.BLOCK)
    tiles = Tiles.of(form, k, target, l1_eighths, l2_eighths)
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
        unpack_block = T.meta_var(partial(unpack, w, k, form))
        height = T.meta_var(T.cast(rows, "int32"))
        with T.sblock("root"):
            tasks = T.min(threads.count(), blocks)
            for task in T.parallel(tasks):
                first = threads.share(blocks, task, tasks)
                share = threads.share(blocks, task + 1, tasks) - first
                if height >= wide:
                    last = T.min(FIELDS * (first + share), small_blocks)
                    tile_rows(output, unpack_block, q, height, FIELDS * first, last, tiles)
                else:
                    column = T.alloc_buffer((padded(k),), "int32")
                    qs = T.alloc_buffer((padded(k),), "int8")
                    total = T.alloc_buffer((1,), "int32")
                    sum32 = T.alloc_buffer((blocks, BLOCK), "int32")
                    write_columns(column, k, GROUP, lambda i: i)
                    for m in T.serial(height):
                        gather(qs, total, q, m, column, k, GROUP)
                        walk(sum32, 0, w, column, qs, k, first, share, form)
                        for b in T.serial(share):
                            finish(output, sum32, b, total[0], m, first + b)

    return end.finish(ternary_matmul)
