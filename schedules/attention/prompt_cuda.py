"""attention of many rows on CUDA's tensor cores: heads that share keys, times rows, are a tile.

    for kv_head, m0, z in Hkv, M/R, Z:               blockIdx; the longest contexts first
        for run in rows of one slot, every Z-th:     mostly one
            q8[64, D] = quantize(q)                  shared; 64 = R rows of each of G heads
            for b in blocks of 64 positions:
                raw(b + 2) -> shared                 cp.async
                k[64, D], v[D, 64] = levels(b + 1)   shared, bytes, unpacked once for 64 queries
                dots[64, 8] = k(b) . q8              a warp; mma m16n8k32, s8
                p, unit, o, total = softmax step     float64 in registers (softmax_cuda.py)
                o[D, 8] += (v(b) . p) * unit         mma m16n8k32, s8 by u8
            y = o / total

    tile | value               | bound by
    8    | queries of a warp   | registers: o is D/4 float64 a lane, 204 in all
    64   | queries of a block  | registers: eight warps a multiprocessor. Twice as many of 128 spill
         |                     | and take as long (docs/log.md)
    64   | positions           | the definition: those that share a unit
    Z    | 1024 / M, at most R | a step of many slots: a block for each run

Queries are the 8 columns of both products, so a lane holds few of them, and their bytes p are
transposed between the two (unpack_cuda.py says in which order positions lie).
"""

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.softmax_cuda import KEYS, SCALE_BYTES, Softmax
from schedules.attention.unpack_cuda import (
    Packed,
    key_row,
    unpack_bos,
    unpack_keys,
    unpack_values,
)
from schedules.intrin import cuda
from schedules.rms_norm.generic import SMALLEST_STAT, int8_code, int8_factor, int8_scale

WARPS = 8
THREADS = WARPS * cuda.WARP
WARP_ROWS = 8
ROWS = WARPS * WARP_ROWS
FEWEST = 17  # rows of a step for which this form is taken
SHARED_RUNS = 1024  # rows of a step up to which several blocks share a tile's runs
VALUE_PITCH = KEYS + 16  # 16 more, for the banks
STAGES = 2


@dataclass(frozen=True)
class Form:
    num_heads: int
    num_kv_heads: int
    dim: int
    bits: int

    @property
    def is_possible(self) -> bool:
        return self.bits < 16 and self.dim in (64, 128) and self.group <= ROWS

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def tile_rows(self) -> int:
        """R: of M."""
        return ROWS // self.group

    @property
    def packed(self) -> Packed:
        return Packed(self.dim, self.bits)

    @property
    def pitch(self) -> int:
        """Bytes of a query's or key's row."""
        return self.dim + 16

    @property
    def key_bytes(self) -> int:
        """Of an unpacked block, before its values."""
        return key_row(KEYS, self.pitch)

    @property
    def level_bytes(self) -> int:
        """Of an unpacked block, before its scales."""
        return self.key_bytes + self.dim * VALUE_PITCH

    @property
    def block_bytes(self) -> int:
        return self.level_bytes + SCALE_BYTES

    @property
    def raw_bytes(self) -> int:
        return 2 * self.packed.block_bytes

    @property
    def shared_bytes(self) -> int:
        """Besides these there are 9 KiB of static ones: TVM asks the driver for more than 48 KiB
        only where these alone are."""
        used = ROWS * self.pitch + 2 * self.block_bytes + STAGES * self.raw_bytes
        return max(used, 48 * 1024)


@dataclass(frozen=True)
class Arrays:
    qkv: Any
    codes: Any
    words: Any  # codes as u32
    scales: Any
    slots: Any
    positions: Any
    y: Any
    rows: Any


class Tile:
    """Emits a block's work: rows m0 .. m0 + R - 1, the heads of kv_head."""

    def __init__(self, form: Form, arrays: Arrays, kv_head, m0, warp, lane):
        self.form, self.arrays = form, arrays
        self.kv_head, self.m0, self.warp, self.lane = kv_head, m0, warp, lane
        self.t = T.bind(warp * cuda.WARP + lane)
        self.queries = cuda.shared_bytes(form.shared_bytes)
        self.blocks = T.bind(self.queries + T.uint32(ROWS * form.pitch))
        self.raw = T.bind(self.blocks + T.uint32(2 * form.block_bytes))
        self.softmax = Softmax(form.dim, lane, self.t, THREADS)
        self.factor = cuda.shared("float64", ROWS)
        # Too large for the memory of a scan: TVM would share it and then want a barrier
        self.starts = cuda.shared("int32", ROWS + 1)
        self.fragment = cuda.local("uint32", 4)  # of keys, of values
        self.query = cuda.local("uint32", form.dim // 16)
        self.sums = cuda.local("uint32", 4)

    def find_runs(self) -> Expr:
        """starts[i] = the tile's row at which its i-th run of one slot begins; how many."""
        rows, slots, t = self.arrays.rows, self.arrays.slots, self.t
        m = self.m0 + t
        slot, before = (slots[T.max(T.min(m - i, rows - 1), 0)] for i in (0, 1))
        is_row = tirx.all(t < self.form.tile_rows, m < rows)
        is_start = T.bind(tirx.all(is_row, tirx.any(t == 0, slot != before)))
        earlier, runs = cuda.Scratch(t, THREADS).scan(T.bind(T.cast(is_start, "int32")))
        with cuda.when(is_start):
            cuda.store(self.starts, t, earlier)
        with cuda.when(t == 0):
            end = T.min(rows - self.m0, self.form.tile_rows)
            cuda.store(self.starts, T.cast(end, "int32"), runs)
        return T.bind(runs)

    def attend(self, run: Expr) -> None:
        """The rows of a run: its slot's blocks, up to the last position."""
        arrays = self.arrays
        cuda.sync()  # the run before this one is done with all of shared memory
        begin, end = T.bind(self.starts[run]), T.bind(self.starts[run + 1])
        slot = T.bind(arrays.slots[self.m0 + begin])
        self.where = slot, self.kv_head
        self.last = T.bind(T.cast(arrays.positions[self.m0 + end - 1], "int32"))
        self._load_queries(begin, end)
        self._start_rows(begin, end)
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
            unpack_bos(self.form.dim, arrays.words, self.where, keys, values, VALUE_PITCH, self.t)
        b = cuda.local("int32", 1)
        cuda.store(b, T.int32(0), 0)
        with T.While(b[0] < blocks):
            cuda.wait_for_copies()
            cuda.sync()
            self._attend_block(T.bind(b[0]), blocks)
            cuda.store(b, b[0] + 1, 0)
        self._write(begin, end)

    def _attend_block(self, b: Expr, blocks: Expr) -> None:
        scale = self._load_scale(b + 1)
        self._copy(b + 2, blocks)
        with cuda.when(b + 1 < blocks):
            self._unpack(b + 1)
        keys, values = self._block(b)
        self._multiply_keys(keys)
        self.softmax.step(T.bind(b * KEYS), self._scales(b))
        self._multiply_values(values)
        self._store_scales(b + 1, scale)

    def _query(self, row: int) -> Expr:
        """Of the tile, the lane's first or second."""
        return T.bind(self.warp * WARP_ROWS + self.lane % 4 * 2 + row)

    def _row(self, i: Expr) -> tuple[Expr, Expr]:
        """(row of M, first column in qkv and y) of the tile's query i."""
        head = self.kv_head * self.form.group + i % self.form.group
        return self.m0 + i // self.form.group, head * self.form.dim

    def _is_inside(self, i: Expr, begin: Expr, end: Expr) -> Expr:
        row = i // self.form.group
        return tirx.all(row >= begin, row < end)

    def _load_queries(self, begin: Expr, end: Expr) -> None:
        """q8 and what scales a query's dot products; a warp its own 16, a lane 4 columns."""
        form, width = self.form, self.form.dim // 4
        together = cuda.WARP // width  # queries that a warp takes at once
        values = cuda.local("float32", 4)
        with T.serial(WARP_ROWS // together) as step:
            i = T.bind(self.warp * WARP_ROWS + step * together + self.lane // width)
            m, first = self._row(i)
            inside = T.bind(self._is_inside(i, begin, end))
            for j in range(4):
                column = first + self.lane % width * 4 + j
                x = T.if_then_else(inside, self.arrays.qkv[m, column], T.float32(0))
                cuda.store(values, x, j)
            top = T.abs(values[0])
            for j in range(1, 4):
                top = T.max(top, T.abs(values[j]))
            amax = cuda.warp_reduce(T.max(T.bind(top), T.float32(SMALLEST_STAT)), "max", width)
            factor, word = T.bind(int8_factor(amax)), T.uint32(0)
            for j in range(4):
                byte = T.reinterpret("uint8", int8_code(values[j], factor))
                word = word | T.cast(byte, "uint32") << T.uint32(8 * j)
            at = i * form.pitch + self.lane % width * 4
            cuda.ptx("st.shared.b32", self.queries + T.cast(at, "uint32"), word)
            with cuda.when(self.lane % width == 0):
                scale = T.cast(int8_scale(amax), "float64") * cuda.float64(form.dim**-0.5)
                cuda.store(self.factor, scale, i)
        cuda.sync()

    def _start_rows(self, begin: Expr, end: Expr) -> None:
        factors, seen = [], []
        for row in range(2):
            i = self._query(row)
            m, _ = self._row(i)
            position = T.if_then_else(
                self._is_inside(i, begin, end), self.arrays.positions[m], T.int64(-1)
            )
            factors.append(T.bind(self.factor[i]))
            seen.append(T.bind(T.cast(position + 1, "int32")))
        self.softmax.start(factors, seen)

    def _copy(self, b: Expr, blocks: Expr) -> None:
        """A block of packed keys and values to its stage; nothing past the last block."""
        packed, codes = self.form.packed, self.arrays.codes
        pieces, size = packed.block_bytes // packed.piece, codes.shape[3]
        stage = T.bind(self.raw + T.cast(b % STAGES * self.form.raw_bytes, "uint32"))
        with cuda.when(b < blocks):
            first = T.bind(packed.first_byte(T.cast(b, "int64")))
            with cuda.strided(2 * pieces, self.t, THREADS) as i:
                at = T.bind(first + i % pieces * packed.piece)
                inside = at < size  # positions past the context's end are not there
                source = codes[(*self.where, i // pieces, T.Select(inside, at, T.int64(0)))]
                to = stage + T.cast(i * packed.piece, "uint32")
                valid = T.Select(inside, packed.piece, 0)
                cuda.copy_bytes(to, T.address_of(source), packed.piece, valid)
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
        stage = T.bind(self.raw + T.cast(b % STAGES * form.raw_bytes, "uint32"))
        keys, values = self._block(b)
        unpack_keys(packed, stage, keys, form.pitch, self.t, THREADS)
        rows = T.bind(stage + T.uint32(packed.block_bytes))
        unpack_values(packed, rows, values, VALUE_PITCH, self.t)

    def _load_scale(self, b: Expr) -> Expr:
        """A thread's: of a key (the first 64) or a value; 0 past the last position."""
        position = T.bind(b * KEYS + self.t % KEYS)
        inside = tirx.all(self.t < 2 * KEYS, position <= self.last)
        scale = self.arrays.scales[(*self.where, T.min(self.t // KEYS, 1), position)]
        return T.bind(T.if_then_else(inside, T.cast(scale, "float32"), T.float32(0)))

    def _store_scales(self, b: Expr, scale: Expr) -> None:
        with cuda.when(self.t < 2 * KEYS):
            self.softmax.store_scale(self._scales(b), self.t, scale)

    def _multiply_keys(self, keys: Expr) -> None:
        """dots[64, 8] of the warp; tile j has every lane's keys 2j, 2j + 1."""
        pitch, lane, dots = self.form.pitch, self.lane, self.softmax.dots
        at = T.cast((self.warp * WARP_ROWS + lane % 8) * pitch + lane // 8 * 16, "uint32")
        query = T.bind(self.queries + at)
        for i in range(self.form.dim // 64):
            cuda.load_matrices(self.query, 4 * i, query + T.uint32(64 * i))
        key = T.bind(keys + T.cast(key_row(lane % 16, pitch) + lane // 16 * 16, "uint32"))
        a = [self.fragment[i] for i in range(4)]
        with cuda.unrolled(KEYS // 16) as j:
            for step in range(self.form.dim // 32):
                at = key + T.cast(key_row(16, pitch) * j + 32 * step, "uint32")
                cuda.load_matrices(self.fragment, 0, at)
                b = self.query[2 * step], self.query[2 * step + 1]
                cuda.multiply(dots, 4 * j, a, b, is_first=step == 0)

    def _multiply_values(self, values: Expr) -> None:
        """o[D, 8] of the warp += v[D, 64] . p[64, 8], 16 columns at a time."""
        lane, p = self.lane, self.softmax.p
        value = T.cast(lane % 16 * VALUE_PITCH + lane // 16 * 16, "uint32")
        value = T.bind(values + value)
        a = [self.fragment[i] for i in range(4)]
        with cuda.unrolled(self.form.dim // 16) as j:
            for step in range(2):
                at = value + T.cast(j * (16 * VALUE_PITCH) + 32 * step, "uint32")
                cuda.load_matrices(self.fragment, 0, at)
                b = p[2 * step], p[2 * step + 1]
                cuda.multiply(self.sums, 0, a, b, b_dtype="u8", is_first=step == 0)
            self.softmax.add(self.sums, j)

    def _write(self, begin: Expr, end: Expr) -> None:
        softmax = self.softmax
        for row in range(2):
            i = self._query(row)
            m, first = self._row(i)
            inverse = softmax.inverse_total(row)
            with cuda.when(self._is_inside(i, begin, end)):
                with cuda.unrolled(self.form.dim // 8) as j:
                    value = softmax.o[softmax.index(j, row)] * inverse
                    column = first + 8 * j + self.lane // 4
                    cuda.store(self.arrays.y, T.cast(value, "float32"), m, column)


def launch(form: Form, *arrays) -> None:
    """The kernel for more than a few rows; arrays as in `Arrays`."""
    given = Arrays(*arrays)
    tiles = T.ceildiv(given.rows, form.tile_rows)
    shares = T.min(T.truncdiv(T.int64(SHARED_RUNS), given.rows) + 1, form.tile_rows)
    with cuda.blocks(form.num_kv_heads) as kv_head:
        with cuda.blocks(tiles, "y") as b, cuda.blocks(shares, "z") as z:
            with cuda.threads(WARPS, "y") as warp, cuda.threads(cuda.WARP) as lane:
                m0 = T.bind((tiles - 1 - b) * form.tile_rows)
                tile = Tile(form, given, kv_head, m0, warp, lane)
                runs = tile.find_runs()
                run = cuda.local("int32", 1)
                cuda.store(run, T.cast(z, "int32"), 0)
                with T.While(run[0] < runs):
                    tile.attend(run[0])
                    cuda.store(run, run[0] + T.cast(shares, "int32"), 0)
