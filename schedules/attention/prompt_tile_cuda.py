"""What attention's kernels of many rows share: a tile of queries, its runs, its two products.

    64 = R rows of each of the G heads that share keys; eight a warp
    dots[64, 8] = k . q8                 a warp; mma m16n8k32, s8
    o[D, 8] += (v . p) * unit            mma m16n8k32, s8 by u8

Queries are the 8 columns of both products, so a lane holds few of them, and their bytes p are
transposed between the two (unpack_cuda.py says in which order positions lie).
"""

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.softmax_cuda import KEYS, SCALE_BYTES, Softmax
from schedules.attention.unpack_cuda import Packed, key_row
from schedules.intrin import cuda
from schedules.rms_norm.generic import SMALLEST_STAT, int8_code, int8_factor, int8_scale

WARP_ROWS = 8
FEWEST = 17  # rows of a step for which these kernels are taken
SHARED_RUNS = 1024  # rows of a step up to which several blocks share a tile's runs
VALUE_PITCH = KEYS + 16  # 16 more, for the banks
SMALLEST_SHARED = 48 * 1024


@dataclass(frozen=True)
class Form:
    num_heads: int
    num_kv_heads: int
    dim: int
    bits: int
    warps: int = 8
    blocks: int = 1  # on a multiprocessor

    @property
    def threads(self) -> int:
        return self.warps * cuda.WARP

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return self.warps * WARP_ROWS

    @property
    def is_possible(self) -> bool:
        return self.bits < 16 and self.dim in (64, 128) and self.group <= self.rows

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def tile_rows(self) -> int:
        """R: of M."""
        return self.rows // self.group

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
    def query_bytes(self) -> int:
        return self.rows * self.pitch


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

    def __init__(self, form: Form, arrays: Arrays, shared_bytes: int, kv_head, m0, warp, lane):
        self.form, self.arrays = form, arrays
        self.kv_head, self.m0, self.warp, self.lane = kv_head, m0, warp, lane
        self.t = T.bind(warp * cuda.WARP + lane)
        # Besides these there are 9 KiB of static ones: TVM asks the driver for more than 48 KiB
        # only where these alone are
        self.queries = cuda.shared_bytes(max(shared_bytes, SMALLEST_SHARED))
        self.softmax = Softmax(form.dim, lane, self.t, form.threads)
        self.factor = cuda.shared("float64", form.rows)
        # Too large for the memory of a scan: TVM would share it and then want a barrier
        self.starts = cuda.shared("int32", form.rows + 1)
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
        earlier, runs = cuda.Scratch(t, self.form.threads).scan(T.bind(T.cast(is_start, "int32")))
        with cuda.when(is_start):
            cuda.store(self.starts, t, earlier)
        with cuda.when(t == 0):
            end = T.min(rows - self.m0, self.form.tile_rows)
            cuda.store(self.starts, T.cast(end, "int32"), runs)
        return T.bind(runs)

    def start_run(self, run: Expr) -> tuple[Expr, Expr]:
        """Its first row and the one after its last, in the tile; queries are quantised."""
        arrays = self.arrays
        cuda.sync()  # the run before this one is done with all of shared memory
        begin, end = T.bind(self.starts[run]), T.bind(self.starts[run + 1])
        slot = T.bind(arrays.slots[self.m0 + begin])
        self.where = slot, self.kv_head
        self.last = T.bind(T.cast(arrays.positions[self.m0 + end - 1], "int32"))
        self._load_queries(begin, end)
        self._start_rows(begin, end)
        return begin, end

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

    def multiply_keys(self, keys: Expr) -> None:
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

    def multiply_values(self, values: Expr) -> None:
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

    def write(self, begin: Expr, end: Expr) -> None:
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


def launch_tiles(form: Form, rows, emit) -> None:
    """emit(kv_head, m0, warp, lane, first run, distance to the next) for every block; the longest
    contexts first."""
    tiles = T.ceildiv(rows, form.tile_rows)
    shares = T.min(T.truncdiv(T.int64(SHARED_RUNS), rows) + 1, form.tile_rows)
    with cuda.blocks(form.num_kv_heads) as kv_head:
        with cuda.blocks(tiles, "y") as b, cuda.blocks(shares, "z") as z:
            with (
                cuda.threads(form.warps, "y") as warp,
                cuda.threads(cuda.WARP) as lane,
                cuda.min_blocks(form.blocks),
            ):
                m0 = T.bind((tiles - 1 - b) * form.tile_rows)
                emit(kv_head, m0, warp, lane, T.cast(z, "int32"), T.cast(shares, "int32"))


def each_run(runs: Expr, first: Expr, distance: Expr, body) -> None:
    run = cuda.local("int32", 1)
    cuda.store(run, first, 0)
    with T.While(run[0] < runs):
        body(run[0])
        cuda.store(run, run[0] + distance, 0)
