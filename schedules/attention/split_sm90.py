"""attention of few rows on Hopper: the context is split over the blocks of a cluster.

    for m, kv head, H heads of its group:        blockIdx.z, blockIdx.y
        for rank in C:                           blockIdx.x: the blocks of a cluster
            for round in blocks/(C U):           the next round's loads go out before the math
                for u in U: K[64], V[64] -> shared        positions ((round U + u) C + rank) 64 on
                for u, h in U, H:                threadIdx.y: a warp a head and block of positions
                    s[2] = q8 . k[t]             two positions a lane, dp4a on packed fields
                    p[64] = softmax step         float64, warp shuffles for peak, total and unit
                    o = o * rescale + (sum of p[t] v[t]) * unit    four rows a dp4a, bytes gathered
        y[H, D] = sum of o on one scale          C U shares, distributed shared memory, float64

    tile | value | bound by
    64   |       | the definition: the positions that share a unit
    C    | 8     | the largest portable cluster: one round up to a context of 512 with one u busy
    U    | 4     | 16 warps with the four heads of a group, 4096 positions in two rounds
    H    | 4, 2 or 1: what divides a group of heads; K and V are read once for all H

With `Rope` the kernel also turns q and the row's own key, and appends key and value to the cache:
what rope and kv_append do, for the one row of a step. The block that holds the row's position then
reads it from registers. All other positions were written by earlier steps, so their loads need not
wait for the launch before.

Integers and float64 give the definition's bits in any order (docs/architecture.md, "Attention").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.cuda import KEYS, LOWEST, ONES, qmax
from schedules.attention.softmax import SMALLEST_UNIT
from schedules.intrin import cuda
from schedules.intrin.exp import nearest
from schedules.kv_append.cuda import head_scale
from schedules.kv_append.generic import BOS_BITS, quantized
from schedules.rms_norm.generic import SMALLEST_STAT, int8_code, int8_factor, int8_scale

BLOCKS = 8  # C
UNITS = 4  # U
HEADS = (4, 2, 1)  # H: they divide C, so that a block's outputs are of one head
LARGEST_TILE = 40 * 1024  # of 48 KB that a block has unasked
QUADS = KEYS // 4  # positions of one dp4a


@dataclass(frozen=True)
class Form:
    """Sizes that a kernel is built for."""

    num_heads: int
    num_kv_heads: int
    dim: int
    kv_bits: int

    @property
    def is_possible(self) -> bool:
        """Whether rows are whole words in every plane of bits."""
        return self.kv_bits < 16 and self.dim % 32 == 0 and self.tile_bytes < LARGEST_TILE

    @property
    def can_turn(self) -> bool:
        """Whether the halves of a head lie a shuffle or a register apart."""
        return self.is_possible and self.dim in (64, 128)

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def heads(self) -> int:
        """H"""
        return next(h for h in HEADS if self.group % h == 0)

    @property
    def warps(self) -> int:
        return UNITS * self.heads

    @property
    def words(self) -> int:
        """Of a head's q8."""
        return self.dim // 4

    @property
    def slots(self) -> int:
        """Words of q8 of a lane."""
        return -(-self.words // cuda.WARP)

    @property
    def row_words(self) -> int:
        """Of a key or value in the cache."""
        return self.dim * self.kv_bits // 32

    @property
    def pitch(self) -> int:
        """Words of a row in shared memory: odd, for the banks."""
        return self.row_words | 1

    @property
    def tile_bytes(self) -> int:
        return UNITS * 2 * KEYS * self.pitch * 4

    @property
    def fields(self) -> int:
        """Codes that share a byte of the (low) plane."""
        return 2 if self.kv_bits == 4 else 4

    @property
    def plane(self) -> int:
        """Bytes of the (low) plane."""
        return self.dim // self.fields

    @property
    def columns(self) -> int:
        """Bytes of the plane that a lane sums."""
        return -(-self.plane // cuda.WARP)

    @property
    def loads(self) -> int:
        """Words of K and V that a thread brings in a round."""
        return 2 * -(-KEYS * self.row_words // (self.heads * cuda.WARP))

    @property
    def bos_words(self) -> int:
        """Of the bos row of a 3-bit cache, which has 4."""
        return self.dim // 8

    def row_start(self, t: Expr) -> Expr:
        """The first word of row t; below 0 for a row of 3 bits at position 0, which is none."""
        if self.kv_bits == 3:
            return self.bos_words + (t - 1) * self.row_words
        return t * self.row_words

    def field(self, words: Sequence[Expr], f: int) -> Expr:
        """The codes of field f, a byte each, from a word of each plane."""
        if self.kv_bits == 4:
            return words[0] >> T.uint32(4 * f) & T.uint32(0x0F0F0F0F)
        low = words[0] >> T.uint32(2 * f) & T.uint32(0x03030303)
        shift = 2 - 2 * f
        high = words[1] << T.uint32(shift) if shift > 0 else words[1] >> T.uint32(-shift)
        return low | high & T.uint32(0x04040404)


@dataclass(frozen=True)
class Cache:
    """One layer's cache and a row's place in it."""

    words: Any  # u32 [S, Hkv, 2, B/4]
    scales: Any
    head: tuple[Expr, Expr]  # slot, key and value head
    position: Expr


@dataclass(frozen=True)
class Rope:
    cos: Any
    sin: Any


@dataclass(frozen=True)
class Row:
    """Row m of the projections."""

    form: Form
    qkv: Any
    m: Expr
    position: Expr

    def load(self, first: Expr, lane: Expr) -> Any:
        """x[4 s + j]: columns 4 (lane + 32 s) + j of a head; lanes past the head repeat it."""
        form, x = self.form, cuda.local("float32", 4 * self.form.slots)
        for slot in range(form.slots):
            word = T.bind(self.word_of(slot, lane))
            with T.vectorized(4) as j:
                cuda.store(x, self.qkv[self.m, first + 4 * word + j], 4 * slot + j)
        return x

    def word_of(self, slot: int, lane: Expr) -> Expr:
        return (lane + slot * cuda.WARP) % self.form.words

    def ask_tables(self, rope: "Rope", lane: Expr) -> list[Any]:
        """The lane's cosines and sines."""
        form, tables = self.form, [cuda.local("float32", 4 * self.form.slots) for _ in range(2)]
        for slot in range(form.slots):
            column = T.bind(4 * (self.word_of(slot, lane) % (form.words // 2)))
            for table, source in zip(tables, (rope.cos, rope.sin), strict=True):
                with T.vectorized(4) as j:
                    cuda.store(table, source[self.position, column + j], 4 * slot + j)
        return tables

    def turn(self, x, tables: list[Any], lane: Expr, is_turned: Expr | None = None) -> Any:
        """Halves x1, x2 of the head: x1 cos - x2 sin, x2 cos + x1 sin, as rope does."""
        form, turned = self.form, cuda.local("float32", 4 * self.form.slots)
        half = form.words // 2
        for slot in range(form.slots):
            is_low = self.word_of(slot, lane) < half
            for j in range(4):
                own, at = x[4 * slot + j], 4 * (slot ^ half // cuda.WARP) + j
                other = T.bind(x[at] if half >= cuda.WARP else cuda.shuffle_xor(own, half))
                signed = T.Select(is_low, -other, other)
                c, s = (T.cast(table[4 * slot + j], "float64") for table in tables)
                y = T.cast(own, "float64") * c + T.cast(signed, "float64") * s
                y = T.cast(y, "float32")
                value = y if is_turned is None else T.Select(is_turned, y, own)
                cuda.store(turned, value, 4 * slot + j)
        return turned


class Block:
    """Emits the work of one block of a cluster for H query heads of row m."""

    def __init__(self, form: Form, cache: Cache, row: Row, readable: Expr, rank, warp, lane):
        self.form, self.cache, self.row = form, cache, row
        self.rank, self.warp, self.lane = rank, warp, lane
        self.unit, self.h = T.bind(warp // form.heads), T.bind(warp % form.heads)
        self.readable = readable  # positions that the cache holds before this launch
        self.seen = T.bind(cache.position + 1)
        self.rounds = T.bind(T.ceildiv(T.ceildiv(self.seen, KEYS), BLOCKS * UNITS))
        self.incoming = cuda.local("uint32", form.loads + 1)
        self.incoming_scales = cuda.local("float32", 4)  # keys, values; two positions each
        self.scales = cuda.local("float32", 4)
        for buffer in (self.incoming, self.incoming_scales):  # for rounds that ask for nothing
            for i in range(int(buffer.shape[0])):
                cuda.store(buffer, T.cast(0, buffer.dtype), i)
        self.tile = cuda.shared("uint32", UNITS * 2 * KEYS * form.pitch)  # flat: TVM takes out gaps
        self.bos = cuda.shared("uint32", 2, form.bos_words)
        self.q = cuda.shared("int32", form.heads, form.words)
        self.sum_q = cuda.shared("int32", form.heads)
        self.factor = cuda.shared("float64", form.heads)  # what a dot product is scaled by
        self.state = cuda.local("float64", 2)  # peak, total
        self.o = cuda.local("float64", form.columns * form.fields)

    def first_of(self, round_: Expr | int) -> Expr:
        """The first position of the warp's block of positions."""
        return T.bind(((round_ * UNITS + self.unit) * BLOCKS + self.rank) * KEYS)

    def at(self, unit: Expr, kv: Expr | int, row: Expr, word: Expr) -> Expr:
        """Where a word of a key or value lies in the tile."""
        return ((unit * 2 + kv) * KEYS + row) * self.form.pitch + word

    def each_word(self, body: Callable[[int, int, Expr], None]) -> None:
        """body(i, kv, which of the 64 rows' words) for those that this thread brings."""
        threads, each = self.form.heads * cuda.WARP, self.form.loads // 2
        t = T.bind(self.h * cuda.WARP + self.lane)
        for i in range(self.form.loads):
            body(i, i // each, i % each * threads + t)

    def bos_word(self) -> tuple[Expr, Expr, Expr]:
        """Whether this thread brings a word of the bos rows, and which: keys or values, word."""
        count, t = self.form.bos_words, self.warp * cuda.WARP + self.lane
        is_first = cuda.both(self.rank == 0, self.readable > 0)
        return cuda.both(is_first, t < 2 * count), T.min(t // count, 1), t % count

    def ask(self, round_: Expr | int) -> None:
        """The loads of a round go out, of readable positions only."""
        form, first = self.form, self.first_of(round_)
        count = T.bind(T.max(T.min(self.readable - first, KEYS), 0))
        base = T.bind(form.row_start(first))
        with cuda.when(count > 0):
            self._ask(first, count, base)

    def _ask(self, first: Expr, count: Expr, base: Expr) -> None:
        form, cache = self.form, self.cache

        last = T.bind(count * form.row_words - 1)  # what lies beyond is given no weight

        def load(i: int, kv: int, word: Expr) -> None:
            at = cache.words[(*cache.head, kv, base + T.min(word, last))]
            cuda.store(self.incoming, at, i)

        self.each_word(load)
        for i in range(4):
            j = T.min(self.lane + i % 2 * cuda.WARP, count - 1)
            half = cache.scales[(*cache.head, i // 2, first + j)]
            cuda.store(self.incoming_scales, T.cast(half, "float32"), i)

    def ask_bos(self) -> None:
        if self.form.kv_bits == 3:
            is_mine, kv, word = self.bos_word()
            at = self.cache.words[(*self.cache.head, kv, word)]
            cuda.store(self.incoming, T.if_then_else(is_mine, at, T.uint32(0)), self.form.loads)

    def put(self, round_: Expr) -> None:
        """What a round asked for into shared memory."""
        with cuda.when(self.first_of(round_) < self.seen):
            self._put()

    def _put(self) -> None:
        form = self.form
        threads = form.heads * cuda.WARP

        def store(i: int, kv: int, word: Expr) -> None:
            gap = form.pitch - form.row_words
            at = self.at(self.unit, kv, 0, word + word // form.row_words * gap if gap else word)
            if (i + 1) % (form.loads // 2) or not KEYS * form.row_words % threads:
                cuda.store(self.tile, self.incoming[i], at)
            else:
                with cuda.when(word < KEYS * form.row_words):
                    cuda.store(self.tile, self.incoming[i], at)

        self.each_word(store)
        for i in range(4):
            cuda.store(self.scales, self.incoming_scales[i], i)

    def put_bos(self) -> None:
        if self.form.kv_bits == 3:
            is_mine, kv, word = self.bos_word()
            with cuda.when(is_mine):
                cuda.store(self.bos, self.incoming[self.form.loads], kv, word)

    def load_query(self, head: Expr, tables: list[Any] | None) -> None:
        """q8 of the warp's head into shared memory."""
        form, x = self.form, self.row.load(head * self.form.dim, self.lane)
        if tables:
            x = self.row.turn(x, tables, self.lane)
        peak = T.float32(SMALLEST_STAT)
        for i in range(4 * form.slots):
            peak = T.max(peak, T.abs(x[i]))
        amax = cuda.warp_reduce(T.bind(peak), "max")
        factor = T.bind(int8_factor(amax))
        total = cuda.local("int32", 1)
        cuda.store(total, T.int32(0), 0)
        for slot in range(form.slots):
            word: Any = T.int32(0)
            for j in range(4):
                byte = T.cast(int8_code(x[4 * slot + j], factor), "int32") & 255
                word = word | T.shift_left(byte, 8 * j)
            word, at = T.bind(word), self.lane + slot * cuda.WARP
            with cuda.when(at < form.words):
                cuda.store(self.q, word, self.h, at)
                cuda.store(total, cuda.dp4a(word, T.int32(ONES), total[0]), 0)
        sum_q = cuda.warp_reduce(total[0], "sum")
        with cuda.when(self.lane == 0):
            cuda.store(self.sum_q, sum_q, self.h)
            root = cuda.float64(form.dim**-0.5)
            cuda.store(self.factor, T.cast(int8_scale(amax), "float64") * root, self.h)

    def start(self) -> None:
        for i in range(self.form.columns * self.form.fields):
            cuda.store(self.o, T.float64(0), i)
        cuda.store(self.state, cuda.float64(LOWEST), 0)
        cuda.store(self.state, T.float64(0), 1)

    def attend(self, round_: Expr) -> None:
        """The warp's block of positions of this round, if it has one."""
        first = self.first_of(round_)
        count = T.bind(T.min(self.seen - first, KEYS))
        with cuda.when(count > 0):
            self._attend(first, count)

    def _attend(self, first: Expr, count: Expr) -> None:
        dots = self._dots(first)
        scores, weights = cuda.local("float64", 2), cuda.local("float64", 2)
        is_seen = [T.bind(self.lane + half * cuda.WARP < count) for half in range(2)]
        for half in range(2):
            scale = T.cast(self.scales[half], "float64") * self.factor[self.h]
            score = T.cast(dots[half], "float64") * scale
            cuda.store(scores, T.Select(is_seen[half], score, cuda.float64(LOWEST)), half)
        top = cuda.warp_reduce(T.max(scores[0], scores[1]), "max")
        peak = T.bind(T.max(self.state[0], top))
        rescale = T.bind(T.exp(self.state[0] - peak))
        cuda.store(self.state, peak, 0)
        for half in range(2):
            e = T.bind(T.exp(scores[half] - peak))
            cuda.store(scores, T.Select(is_seen[half], e, T.float64(0)), half)
            cuda.store(weights, scores[half] * T.cast(self.scales[2 + half], "float64"), half)
        total = cuda.warp_reduce(scores[0] + scores[1], "sum")
        cuda.store(self.state, self.state[1] * rescale + total, 1)
        unit = T.bind(cuda.warp_reduce(T.max(weights[0], weights[1]), "max") / T.float64(255))
        divisor = T.bind(T.max(unit, cuda.float64(SMALLEST_UNIT)))
        p = [T.bind(T.cast(nearest(weights[half] / divisor), "int32")) for half in range(2)]
        self._add_values(first, p, rescale, unit)

    def _dots(self, first: Expr) -> Any:
        """q8 . k of positions first + lane and first + 32 + lane."""
        form, dots = self.form, cuda.local("int32", 2)
        count = form.plane // 4
        for half in range(2):
            cuda.store(dots, -qmax(form.kv_bits) * self.sum_q[self.h], half)
        with T.serial(count) as i:
            words = [self._key_words(i, half) for half in range(2)]
            for f in range(form.fields):
                q = T.bind(self.q[self.h, i + f * count])
                for half in range(2):
                    codes = T.reinterpret("int32", form.field(words[half], f))
                    cuda.store(dots, cuda.dp4a(q, codes, dots[half]), half)
        if form.kv_bits == 3:
            with cuda.when(cuda.both(first == 0, self.lane == 0)):
                cuda.store(dots, -qmax(BOS_BITS) * self.sum_q[self.h], 0)
                with T.serial(form.bos_words) as i:
                    for f in range(2):
                        codes = self.bos[0, i] >> T.uint32(4 * f) & T.uint32(0x0F0F0F0F)
                        q = self.q[self.h, i + f * form.bos_words]
                        product = cuda.dp4a(q, T.reinterpret("int32", codes), dots[0])
                        cuda.store(dots, product, 0)
        return dots

    def _key_words(self, i: Expr, half: int) -> tuple[Expr, ...]:
        """Word i of the low plane of a lane's key; of a 3-bit row, the word of its high bits too,
        the bit of field 0 lowest in each byte."""
        form, row = self.form, self.lane + half * cuda.WARP
        low = T.bind(self.tile[self.at(self.unit, 0, row, i)])
        if form.kv_bits == 4:
            return (low,)
        high_words = form.dim // 32
        high = self.tile[self.at(self.unit, 0, row, form.plane // 4 + i % high_words)]
        return low, T.bind(high >> T.cast(i // high_words, "uint32"))

    def _add_values(self, first: Expr, p: list[Expr], rescale: Expr, unit: Expr) -> None:
        """o = o * rescale + (sum of p[t] v[t]) * unit"""
        form = self.form
        sums = cuda.local("uint32", form.columns * form.fields)
        for i in range(form.columns * form.fields):
            cuda.store(sums, T.uint32(0), i)
        bos_weight = T.int32(0)
        if form.kv_bits == 3:  # the bos row leaves p
            is_bos = T.bind(cuda.both(first == 0, self.lane == 0))
            mine = T.bind(T.Select(is_bos, p[0], 0))
            bos_weight = T.bind(cuda.shuffle(mine, 0))
            p = [T.bind(p[0] - mine), p[1]]
        bias = T.bind(cuda.warp_reduce(p[0] + p[1], "sum") * qmax(form.kv_bits))
        quads = [self._quad(value) for value in p]
        with T.serial(QUADS) as i:
            of_half = T.Select(i < QUADS // 2, quads[0], quads[1])
            weights = T.bind(cuda.shuffle(of_half, i % (QUADS // 2) * 4))
            for column in range(form.columns):
                self._add_quad(sums, weights, 4 * i, column)
        for column in range(form.columns):
            for f in range(form.fields):
                at = column * form.fields + f
                total = T.reinterpret("int32", sums[at]) - bias
                if form.kv_bits == 3:
                    total = total + bos_weight * self._bos_level(self.dim_of(column, f))
                cuda.store(self.o, self.o[at] * rescale + T.cast(total, "float64") * unit, at)

    def _quad(self, p: Expr) -> Expr:
        """p of the four lanes of a group in one word."""
        word = T.bind(T.cast(p, "uint32") << T.cast(self.lane % 4 * 8, "uint32"))
        for lanes in (1, 2):
            word = T.bind(word | cuda.shuffle_xor(word, lanes))
        return word

    def _add_quad(self, sums, weights: Expr, row: Expr, column: int) -> None:
        """sums += weights . the codes of four rows, in the lane's byte of the plane."""
        form, byte = self.form, self.byte_of(column)
        words = [self._gather(row, byte)]
        if form.kv_bits == 3:
            high_bytes = form.dim // 8
            high = self._gather(row, form.plane + byte % high_bytes)
            words.append(T.bind(high >> T.cast(byte // high_bytes, "uint32")))
        for f in range(form.fields):
            at = column * form.fields + f
            cuda.store(sums, cuda.dp4a_unsigned(weights, form.field(words, f), sums[at]), at)

    def _gather(self, row: Expr, byte: Expr) -> Expr:
        """Byte `byte` of four rows of values."""
        four = [T.bind(self.tile[self.at(self.unit, 1, row + r, byte // 4)]) for r in range(4)]
        which = T.bind(T.cast(byte % 4 * 17 + 64, "uint32"))  # that byte of one, of the other
        low, high = (cuda.byte_permute(a, b, which) for a, b in (four[:2], four[2:]))
        return T.bind(cuda.byte_permute(low, high, 0x5410))

    def byte_of(self, column: int) -> Expr:
        return T.min(self.lane + column * cuda.WARP, self.form.plane - 1)

    def dim_of(self, column: int, f: int) -> Expr:
        return self.byte_of(column) + f * self.form.plane

    def _bos_level(self, d: Expr) -> Expr:
        half = self.form.dim // 2
        word = self.bos[1, d % half // 4]
        shift = T.cast(d % half % 4 * 8 + d // half * 4, "uint32")
        return T.cast(word >> shift & T.uint32(15), "int32") - qmax(BOS_BITS)

    def finish(self, y, m, first_head: Expr) -> None:
        """The block's share of the outputs, all of one head: a lane for each of the C U shares."""
        form = self.form
        o = cuda.shared("float64", UNITS, form.heads, form.dim)
        state = cuda.shared("float64", UNITS, form.heads, 2)
        cuda.sync()  # TVM may give these the memory of keys and values
        for column in range(form.columns):
            for f in range(form.fields):
                with cuda.when(self.lane + column * cuda.WARP < form.plane):
                    d = self.dim_of(column, f)
                    cuda.store(o, self.o[column * form.fields + f], self.unit, self.h, d)
        with cuda.when(self.lane == 0):
            for i in range(2):
                cuda.store(state, self.state[i], self.unit, self.h, i)
        cuda.sync_cluster()
        self._merge(o, state, y, m, first_head)
        cuda.sync_cluster()  # a block's shared memory lives until all have read it

    def _merge(self, o, state, y, m, first_head: Expr) -> None:
        """C neighbouring lanes an output; the factors of all C U shares are in a warp's lanes."""
        form, lane = self.form, self.lane
        outputs = form.heads * form.dim // BLOCKS  # of a block
        first = T.bind(self.rank * outputs)
        h = T.bind(first // form.dim)
        u, other = T.bind(lane % UNITS), T.bind(T.cast(lane // UNITS, "uint32"))
        peak = cuda.load_remote(state, (u * form.heads + h) * 2, other)
        total = cuda.load_remote(state, (u * form.heads + h) * 2 + 1, other)
        factor = T.bind(T.exp(peak - cuda.warp_reduce(peak, "max")))
        total = cuda.warp_reduce(T.bind(factor * total), "sum")
        block = T.bind(T.cast(lane % BLOCKS, "uint32"))
        factors = [T.bind(cuda.shuffle(factor, lane % BLOCKS * UNITS + u)) for u in range(UNITS)]
        t, threads = self.warp * cuda.WARP + lane, form.warps * cuda.WARP
        with T.serial(-(-outputs * BLOCKS // threads)) as step:
            i = T.bind(first + T.min((step * threads + t) // BLOCKS, outputs - 1))
            value = T.float64(0)
            for u in range(UNITS):
                at = u * form.heads * form.dim + i
                value = value + factors[u] * cuda.load_remote(o, at, block)
            value = cuda.warp_reduce(T.bind(value), "sum", BLOCKS)
            with cuda.when(lane % BLOCKS == 0):
                y_at = first_head * form.dim + i
                cuda.store(y, T.cast(value / total, "float32"), m, y_at)


class Own:
    """Key and value of the row itself, by two warps of the block that attends to its position:
    quantised, packed, written to the cache, and given to the block."""

    def __init__(self, block: Block):
        self.block, self.cache = block, block.cache
        form, position = block.form, block.cache.position
        unit = T.bind(position // KEYS)
        self.round = T.bind(unit // (BLOCKS * UNITS))
        self.unit = T.bind(unit // BLOCKS % UNITS)
        self.kv = T.bind(block.warp - (form.warps - 2))
        is_mine = cuda.both(block.rank == unit % BLOCKS, self.kv >= 0)
        self.is_mine = T.bind(is_mine)
        self.packed = cuda.local("uint32", 3)  # low plane, high plane, bos row: a word a lane
        self.scale = cuda.local("float32", 1)
        self.scales = cuda.shared("float32", 2)

    def compute(self, tables: list[Any]) -> None:
        block, form = self.block, self.block.form
        with cuda.when(self.is_mine):
            kv_heads = form.num_heads + self.kv * form.num_kv_heads
            first = T.bind((kv_heads + self.cache.head[1]) * form.dim)
            x = block.row.load(first, block.lane)
            x = block.row.turn(x, tables, block.lane, self.kv == 0)
            peak = T.float32(0)
            for i in range(4 * form.slots):
                peak = T.max(peak, T.abs(x[i]))
            amax = cuda.warp_reduce(T.bind(peak), "max")
            limit = T.int32(qmax(form.kv_bits))
            if form.kv_bits == 3:
                limit = T.Select(self.cache.position == 0, T.int32(qmax(BOS_BITS)), limit)
            limit = T.bind(limit)
            scale = T.bind(head_scale(amax, T.cast(limit, "float32")))
            cuda.store(self.scale, scale, 0)
            self._pack([self._word(x, slot, scale, limit) for slot in range(form.slots)])

    def _word(self, x, slot: int, scale: Expr, limit: Expr) -> Expr:
        """Four codes, a byte each."""
        word: Any = T.uint32(0)
        for j in range(4):
            code = T.cast(quantized(x[4 * slot + j] / scale, limit), "uint32")
            word = word | code << T.uint32(8 * j)
        return T.bind(word)

    def _pack(self, codes: list[Expr]) -> None:
        if self.block.form.kv_bits == 4:
            cuda.store(self.packed, self._plane(codes, 2), 0)
            return
        low = [word & T.uint32(0x03030303) for word in codes]
        high = [word >> T.uint32(2) & T.uint32(ONES) for word in codes]
        for i, (words, fields) in enumerate(((low, 4), (high, 8), (codes, 2))):
            cuda.store(self.packed, self._plane(words, fields), i)

    def _plane(self, words: list[Expr], fields: int) -> Expr:
        """A plane's word i, in lane i: the fields of words i, i + P, i + 2 P, ..."""
        form, lane = self.block.form, self.block.lane
        count = form.words // fields  # P
        plane: Any = T.uint32(0)
        for slot, word in enumerate(words):
            field = self.block.row.word_of(slot, lane) // count
            plane = plane | word << T.cast(field * (8 // fields), "uint32")
        plane, step = T.bind(plane), count
        while step < min(cuda.WARP, form.words):
            plane = T.bind(plane | cuda.shuffle_xor(plane, step))
            step *= 2
        return plane

    def _each_word(self, body: Callable[[int, int, int], None]) -> None:
        """body(which of packed, words of it, first word in the row), of a row of kv_bits."""
        form = self.block.form
        body(0, form.plane // 4, 0)
        if form.kv_bits == 3:
            body(1, form.dim // 32, form.plane // 4)

    def append(self) -> None:
        """To the cache, by one block of those that have the same keys."""
        block, form, cache = self.block, self.block.form, self.cache
        lane, at = block.lane, T.bind(form.row_start(cache.position))

        def write(i: int, count: int, start: int) -> None:
            with cuda.when(lane < count):
                where = (*cache.head, self.kv, at + start + lane)
                cuda.store(cache.words, self.packed[i], *where)

        with cuda.when(self.is_mine):
            with cuda.when(lane == 0):
                half = T.cast(self.scale[0], "float16")
                cuda.store(cache.scales, half, *cache.head, self.kv, cache.position)
            if form.kv_bits == 4:
                self._each_word(write)
                return
            with T.If(cache.position == 0):
                with T.Then():
                    with cuda.when(lane < form.bos_words):
                        cuda.store(cache.words, self.packed[2], *cache.head, self.kv, lane)
                with T.Else():
                    self._each_word(write)

    def put(self, round_: Expr) -> None:
        """Into the shared memory of the round's keys and values."""
        block, form, lane = self.block, self.block.form, self.block.lane
        row = T.bind(self.cache.position % KEYS)

        def write(i: int, count: int, start: int) -> None:
            with cuda.when(lane < count):
                at = block.at(self.unit, self.kv, row, start + lane)
                cuda.store(block.tile, self.packed[i], at)

        with cuda.when(cuda.both(self.is_mine, round_ == self.round)):
            self._each_word(write)
            if form.kv_bits == 3:
                with cuda.when(cuda.both(self.cache.position == 0, lane < form.bos_words)):
                    cuda.store(block.bos, self.packed[2], self.kv, lane)
            with cuda.when(lane == 0):
                cuda.store(self.scales, self.scale[0], self.kv)
        cuda.sync()
        first = block.first_of(round_)
        for i in range(4):
            is_own = first + lane + i % 2 * cuda.WARP == self.cache.position
            scale = T.if_then_else(is_own, self.scales[i // 2], block.scales[i])
            cuda.store(block.scales, scale, i)


def launch(form: Form, rows, qkv, words, scales, slots, positions, y, rope=None) -> None:
    """A cluster for every row and H heads. With `rope` (cos, sin), rows is 1 and the row's key and
    value are turned and appended first."""

    def emit(rank, g, m, warp, lane):
        first_head = T.bind(g * form.heads)
        slot, position = (T.bind(T.cast(a[m], "int32")) for a in (slots, positions))
        cache = Cache(words, scales, (slot, T.bind(first_head // form.group)), position)
        row = Row(form, qkv, m, position)
        block = Block(form, cache, row, position if rope else position + 1, rank, warp, lane)
        own = tables = None
        if rope:
            block.ask(0)
            block.ask_bos()
            tables = row.ask_tables(Rope(*rope), lane)
            own = Own(block)
            cuda.wait_for_launch()
            own.compute(tables)
            with cuda.when(first_head % form.group == 0):
                own.append()
        else:
            cuda.wait_for_launch()
            block.ask(0)
            block.ask_bos()
        with cuda.when(block.unit == 0):
            block.load_query(first_head + block.h, tables)
        cuda.let_next_launch()
        block.start()
        with T.serial(block.rounds) as round_:
            cuda.sync()  # nobody reads the last round's rows any more
            block.put(round_)
            with cuda.when(round_ == 0):
                block.put_bos()
            cuda.sync()
            if own:
                own.put(round_)
            block.ask(round_ + 1)
            block.attend(round_)
        block.finish(y, m, first_head)

    with cuda.cluster(BLOCKS) as rank:
        with cuda.blocks(form.num_heads // form.heads, "y") as g, cuda.blocks(rows, "z") as m:
            with cuda.threads(form.warps, "y") as warp, cuda.threads(cuda.WARP) as lane:
                emit(rank, g, m, warp, lane)
