"""split_sm90's arithmetic: scores of 64 positions, their weights as bytes, the sum of values."""

from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.cuda import KEYS, LOWEST, qmax
from schedules.attention.softmax import SMALLEST_UNIT
from schedules.attention.split_row_sm90 import Cache, Form, Row
from schedules.attention.split_tile_sm90 import Tile
from schedules.intrin import cuda
from schedules.intrin import lanes_cuda as lanes
from schedules.intrin.exp import nearest
from schedules.kv_append.generic import BOS_BITS

QUADS = KEYS // 4  # positions of one dp4a


class Block(Tile):
    """Emits the work of one block of a cluster for H query heads of row m."""

    def __init__(self, form: Form, cache: Cache, row: Row, readable: Expr, rank, warp, lane):
        super().__init__(form, cache, row, readable, rank, warp, lane)
        self.state = cuda.local("float64", 2)  # peak, total
        self.o = cuda.local("float64", form.columns * form.fields)

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
        top = lanes.max_float64(T.max(scores[0], scores[1]))
        peak = T.bind(T.max(self.state[0], top))
        rescale = T.bind(T.exp(self.state[0] - peak))
        cuda.store(self.state, peak, 0)
        for half in range(2):
            e = T.bind(T.exp(scores[half] - peak))
            cuda.store(scores, T.Select(is_seen[half], e, T.float64(0)), half)
            cuda.store(weights, scores[half] * T.cast(self.scales[2 + half], "float64"), half)
        total = lanes.sum_float64(scores[0] + scores[1])
        cuda.store(self.state, self.state[1] * rescale + total, 1)
        unit = T.bind(lanes.max_float64(T.max(weights[0], weights[1])) / T.float64(255))
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
        bias = T.bind(cuda.warp_count(T.bind(p[0] + p[1])) * qmax(form.kv_bits))
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
        for step in (1, 2):
            word = T.bind(word | cuda.shuffle_xor(word, step))
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
