"""attention of many rows on CUDA's tensor cores: heads that share keys, times rows, are a tile.

for kv_head, m0, z in Hkv, M/R, Z:               blockIdx; the longest contexts first
    for run in rows of one slot, every Z-th:     mostly one
        q8[64, D] = quantize(q)                  shared; 64 = R rows of each of G heads
        for b in blocks of 64 positions:
            raw(b + 2) -> shared                 cp.async
            k[64, D], v[D, 64] = levels(b + 1)   shared, bytes, unpacked once for 64 queries
            dots, p, unit, o, total              prompt_tile_cuda.py, softmax_cuda.py
        y = o / total

tile | value               | bound by
8    | queries of a warp   | registers: o is D/4 float64 a lane, 204 in all
64   | queries of a block  | registers: eight warps a multiprocessor. Twice as many of 128 spill
     |                     | and take as long (docs/log.md)
64   | positions           | the definition: those that share a unit
Z    | 1024 / M, at most R | a step of many slots: a block for each run
"""

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.prompt_tile_cuda import (
    VALUE_PITCH,
    Arrays,
    Form,
    Tile,
    each_run,
    launch_tiles,
)
from schedules.attention.softmax_cuda import KEYS
from schedules.attention.unpack_cuda import unpack_bos, unpack_keys, unpack_values
from schedules.intrin import cuda

STAGES = 2


def raw_bytes(form: Form) -> int:
    return 2 * form.packed.block_bytes


def copy_packed(form: Form, codes, where: tuple, b: Expr, to: Expr, t: Expr) -> None:
    """A block of packed keys, then of values, to shared memory, asynchronously."""
    packed = form.packed
    pieces, size = packed.block_bytes // packed.piece, codes.shape[3]
    first = T.bind(packed.first_byte(T.cast(b, "int64")))
    with cuda.strided(2 * pieces, t, form.threads) as i:
        at = T.bind(first + i % pieces * packed.piece)
        inside = at < size  # positions past the context's end are not there
        source = codes[(*where, i // pieces, T.Select(inside, at, T.int64(0)))]
        valid = T.Select(inside, packed.piece, 0)
        piece = to + T.cast(i * packed.piece, "uint32")
        cuda.copy_bytes(piece, T.address_of(source), packed.piece, valid)


def load_scale(scales, where: tuple, b: Expr, last: Expr, t: Expr) -> Expr:
    """A thread's: of a key (the first 64) or a value; 0 past the last position."""
    position = T.bind(b * KEYS + t % KEYS)
    inside = tirx.all(t < 2 * KEYS, position <= last)
    scale = scales[(*where, T.min(t // KEYS, 1), position)]
    return T.bind(T.if_then_else(inside, T.cast(scale, "float32"), T.float32(0)))


class PackedTile(Tile):
    """Unpacks what it attends to."""

    def __init__(self, form: Form, arrays: Arrays, *where):
        used = form.query_bytes + 2 * form.block_bytes + STAGES * raw_bytes(form)
        super().__init__(form, arrays, used, *where)
        self.blocks = T.bind(self.queries + T.uint32(form.query_bytes))
        self.raw = T.bind(self.blocks + T.uint32(2 * form.block_bytes))

    def attend(self, run: Expr) -> None:
        """The rows of a run: its slot's blocks, up to the last position."""
        begin, end = self.start_run(run)
        blocks = T.bind(self.last // KEYS + 1)
        self._copy(T.int32(0), blocks)
        cuda.wait_for_copies()
        cuda.sync()
        self._copy(T.int32(1), blocks)
        self._unpack(T.int32(0))
        self._store_scales(T.int32(0), self._load_scale(T.int32(0)))
        if self.form.bits == 3:
            cuda.sync()
            keys, values = self._block(T.int32(0))
            words, dim = self.arrays.words, self.form.dim
            unpack_bos(dim, words, self.where, keys, values, VALUE_PITCH, self.t)
        b = cuda.local("int32", 1)
        cuda.store(b, T.int32(0), 0)
        with T.While(b[0] < blocks):
            cuda.wait_for_copies()
            cuda.sync()
            self._attend_block(T.bind(b[0]), blocks)
            cuda.store(b, b[0] + 1, 0)
        self.write(begin, end)

    def _attend_block(self, b: Expr, blocks: Expr) -> None:
        scale = self._load_scale(b + 1)
        self._copy(b + 2, blocks)
        with cuda.when(b + 1 < blocks):
            self._unpack(b + 1)
        keys, values = self._block(b)
        self.multiply_keys(keys)
        self.softmax.step(T.bind(b * KEYS), self._scales(b))
        self.multiply_values(values)
        self._store_scales(b + 1, scale)

    def _copy(self, b: Expr, blocks: Expr) -> None:
        """A block of packed keys and values to its stage; nothing past the last block."""
        stage = T.bind(self.raw + T.cast(b % STAGES * raw_bytes(self.form), "uint32"))
        with cuda.when(b < blocks):
            copy_packed(self.form, self.arrays.codes, self.where, b, stage, self.t)
        cuda.commit_copies()

    def _block(self, b: Expr) -> tuple[Expr, Expr]:
        """Where block b's levels are: keys, values."""
        keys = T.bind(self.blocks + T.cast(b % 2 * self.form.block_bytes, "uint32"))
        return keys, T.bind(keys + T.uint32(self.form.key_bytes))

    def _scales(self, b: Expr) -> Expr:
        keys, _ = self._block(b)
        return T.bind(keys + T.uint32(self.form.level_bytes))

    def _unpack(self, b: Expr) -> None:
        form, packed = self.form, self.form.packed
        stage = T.bind(self.raw + T.cast(b % STAGES * raw_bytes(form), "uint32"))
        keys, values = self._block(b)
        unpack_keys(packed, stage, keys, form.pitch, self.t, self.form.threads)
        rows = T.bind(stage + T.uint32(packed.block_bytes))
        unpack_values(packed, rows, values, VALUE_PITCH, self.t)

    def _load_scale(self, b: Expr) -> Expr:
        return load_scale(self.arrays.scales, self.where, b, self.last, self.t)

    def _store_scales(self, b: Expr, scale: Expr) -> None:
        with cuda.when(self.t < 2 * KEYS):
            self.softmax.store_scale(self._scales(b), self.t, scale)


def launch(form: Form, *arrays) -> None:
    """The kernel for more than a few rows; arrays as in `Arrays`."""

    def emit(kv_head, m0, warp, lane, first: Expr, distance: Expr) -> None:
        tile = PackedTile(form, Arrays(*arrays), kv_head, m0, warp, lane)
        each_run(tile.find_runs(), first, distance, tile.attend)

    launch_tiles(form, Arrays(*arrays).rows, emit)
