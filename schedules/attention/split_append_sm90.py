"""split_sm90's own row: its key and value turned, quantised, packed and appended to the cache."""

from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.cuda import KEYS, ONES, qmax
from schedules.attention.split_attend_sm90 import Block
from schedules.attention.split_row_sm90 import BLOCKS, UNITS
from schedules.intrin import cuda
from schedules.intrin import lanes_cuda as lanes
from schedules.kv_append.cuda import head_scale
from schedules.kv_append.generic import BOS_BITS, quantized


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
            amax = lanes.max_float32(T.bind(peak))
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

    def put(self, round_: Expr | int) -> None:
        """Into the shared memory of the round's keys and values, which are there; a barrier after
        it, before anything of them is read."""
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

    def set_scales(self, round_: Expr) -> None:
        """Of the round's positions, the row's own among them."""
        block = self.block
        first, lane = block.first_of(round_), block.lane
        for i in range(4):
            is_own = first + lane + i % 2 * cuda.WARP == self.cache.position
            scale = T.if_then_else(is_own, self.scales[i // 2], block.scales[i])
            cuda.store(block.scales, scale, i)
