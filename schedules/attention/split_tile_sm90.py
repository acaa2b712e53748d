"""split_sm90's loads: keys, values and scales by registers into shared memory, a round ahead; q8.

A warp brings the words of its block of 64 positions with the warps of the same block's other heads.
"""

from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.cuda import KEYS, ONES
from schedules.attention.split_row_sm90 import BLOCKS, UNITS, Cache, Form, Row
from schedules.intrin import cuda
from schedules.intrin import lanes_cuda as lanes
from schedules.rms_norm.generic import SMALLEST_STAT, int8_code, int8_factor, int8_scale


class Tile:
    """Emits the loads of one block of a cluster, for H query heads of row m."""

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
        size = form.tile_bytes + form.exchange_bytes + form.inbox_bytes
        self.tile = cuda.shared("uint32", size // 4)  # flat: TVM takes out gaps
        self.bos = cuda.shared("uint32", 2, form.bos_words)
        self.q = cuda.shared("int32", form.heads, form.words)
        self.sum_q = cuda.shared("int32", form.heads)
        self.factor = cuda.shared("float64", form.heads)  # what a dot product is scaled by

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
        amax = lanes.max_float32(T.bind(peak))
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
        sum_q = cuda.warp_count(total[0])
        with cuda.when(self.lane == 0):
            cuda.store(self.sum_q, sum_q, self.h)
            root = cuda.float64(form.dim**-0.5)
            cuda.store(self.factor, T.cast(int8_scale(amax), "float64") * root, self.h)
