"""split_sm90's arithmetic: scores of 64 positions, their weights as bytes, the sum of values.

The H warps of a block of positions share its keys and values: each unpacks 64 / H keys for all H
heads, then weighs the scores of one head, then unpacks a share of the values' bytes for all heads.

    lanes of a warp   | keys                             | values
    lane // (32 / H)  |                                  | 64 / H positions, then the head it sums
    lane % (32 / H)   |                                  | bytes of the warp's share of a row
    lane              | the key; H = 1: two, 32 apart    |
"""

from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.cuda import KEYS, LOWEST, qmax
from schedules.attention.softmax import SMALLEST_UNIT
from schedules.attention.split_row_sm90 import EXCHANGE_BYTES, Cache, Form, Row
from schedules.attention.split_tile_sm90 import Tile
from schedules.intrin import cuda
from schedules.intrin import lanes_cuda as lanes
from schedules.intrin.exp import nearest
from schedules.kv_append.generic import BOS_BITS

QUADS = KEYS // 4  # positions of one dp4a
P, FACTORS, OFFSETS = 4 * KEYS, 5 * KEYS, 5 * KEYS + 16  # after a head's dot products


class Block(Tile):
    """Emits the work of one block of a cluster for H query heads of row m."""

    def __init__(self, form: Form, cache: Cache, row: Row, readable: Expr, rank, warp, lane):
        super().__init__(form, cache, row, readable, rank, warp, lane)
        heads = form.heads
        self.state = cuda.local("float64", 2)  # peak, total: of the warp's head
        self.o = cuda.local("float64", form.columns * form.fields)  # of the lane's head
        self.group, self.place = T.bind(lane // (cuda.WARP // heads)), lane % (cuda.WARP // heads)
        self.memory = T.bind(T.cuda.cvta_generic_to_shared(self.tile.data))
        self.exchange = T.bind(self.memory + T.uint32(form.tile_bytes))

    def of_head(self, h: Expr | int, at: int) -> Expr:
        """Where a head's value lies that the warps of a block of positions exchange. By address:
        TVM puts barriers of the whole block where it sees accesses, and not every unit is here."""
        head = self.unit * self.form.heads + h
        return self.exchange + cuda.offset(head * EXCHANGE_BYTES) + T.uint32(at)

    def start(self) -> None:
        for i in range(self.form.columns * self.form.fields):
            cuda.store(self.o, T.float64(0), i)
        cuda.store(self.state, cuda.float64(LOWEST), 0)
        cuda.store(self.state, T.float64(0), 1)

    def attend(self, round_: Expr) -> None:
        """The warp's block of positions of this round, if it has one. Warps that have none pass
        the same barriers: racecheck does not count the block's next barrier for warps that passed
        one of their own which others did not."""
        first = self.first_of(round_)
        count = T.bind(T.min(self.seen - first, KEYS))
        with cuda.when(count > 0):
            self._share_dots()
        self._sync_unit()
        with cuda.when(count > 0):
            self._weigh(first, count)
        self._sync_unit()
        with cuda.when(count > 0):
            self._add_values()

    def _sync_unit(self) -> None:
        """A barrier of the warps of a block of positions."""
        if self.form.heads == 1:
            T.evaluate(T.cuda.warp_sync())
        else:
            count = T.uint32(self.form.heads * cuda.WARP)
            cuda.ptx("bar.sync", cuda.offset(self.unit + 1), count)

    def _share_dots(self) -> None:
        """q8 . k of every head and the warp's share of the keys, by codes that are not negative."""
        form, heads = self.form, self.form.heads
        halves, count = 2 // heads, form.plane // 4
        own = T.bind(self.h * cuda.WARP + self.lane)
        dots = cuda.local("int32", heads * halves)
        for i in range(heads * halves):
            cuda.store(dots, T.int32(0), i)
        with T.serial(count) as i:
            packed = [self._key_words(i, own + half * cuda.WARP) for half in range(halves)]
            for f in range(form.fields):
                codes = [T.reinterpret("int32", form.field(words, f)) for words in packed]
                codes = [T.bind(word) for word in codes]
                for h in range(heads):
                    q = T.bind(self.q[h, i + f * count])
                    for half in range(halves):
                        at = h * halves + half
                        cuda.store(dots, cuda.dp4a(q, codes[half], dots[at]), at)
        for h in range(heads):
            for half in range(halves):
                at = self.of_head(h, 4 * half * cuda.WARP) + cuda.offset(4 * own)
                cuda.ptx("st.shared.b32", at, T.reinterpret("uint32", dots[h * halves + half]))

    def _key_words(self, i: Expr, row: Expr) -> tuple[Expr, ...]:
        """Word i of the low plane of a key; of a 3-bit row, the word of its high bits too, the bit
        of field 0 lowest in each byte."""
        form = self.form
        low = T.bind(self.tile[self.at(self.unit, 0, row, i)])
        if form.kv_bits == 4:
            return (low,)
        high_words = form.dim // 32
        high = self.tile[self.at(self.unit, 0, row, form.plane // 4 + i % high_words)]
        return low, T.bind(high >> T.cast(i // high_words, "uint32"))

    def _weigh(self, first: Expr, count: Expr) -> None:
        """The scores of the warp's head, on its peak so far, as bytes of a unit."""
        dots = self._own_dots(first)
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
        most = lanes.max_float64(T.max(weights[0], weights[1]))
        unit = T.bind(most * cuda.float64(1 / 255))
        inverse = cuda.reciprocal(T.bind(T.max(unit, cuda.float64(SMALLEST_UNIT))))
        p = [T.bind(T.cast(nearest(weights[half] * inverse), "int32")) for half in range(2)]
        self._store_weights(first, p, rescale, unit)
        total = lanes.sum_float64(scores[0] + scores[1])
        cuda.store(self.state, self.state[1] * rescale + total, 1)

    def _own_dots(self, first: Expr) -> Any:
        """Of positions first + lane and first + 32 + lane: the levels' sums."""
        form, dots, word = self.form, cuda.local("int32", 2), cuda.local("uint32", 1)
        bias = T.bind(qmax(form.kv_bits) * self.sum_q[self.h])
        for half in range(2):
            at = self.of_head(self.h, 4 * half * cuda.WARP) + cuda.offset(4 * self.lane)
            cuda.ptx("ld.shared.b32", word[0], at)
            cuda.store(dots, T.reinterpret("int32", word[0]) - bias, half)
        if form.kv_bits == 3:
            with cuda.when(first == 0):
                dot = self._dot_of_bos()
                cuda.store(dots, T.Select(self.lane == 0, dot, dots[0]), 0)
        return dots

    def _dot_of_bos(self) -> Expr:
        """Position 0 by all lanes: word i of bos holds words i and i + D/8 of the head."""
        form, dot = self.form, cuda.local("int32", 1)
        cuda.store(dot, T.int32(0), 0)
        with cuda.strided(form.bos_words, self.lane, cuda.WARP) as i:
            for f in range(2):
                codes = self.bos[0, i] >> T.uint32(4 * f) & T.uint32(0x0F0F0F0F)
                q = self.q[self.h, i + f * form.bos_words]
                cuda.store(dot, cuda.dp4a(q, T.reinterpret("int32", codes), dot[0]), 0)
        return T.bind(cuda.warp_count(dot[0]) - qmax(BOS_BITS) * self.sum_q[self.h])

    def _store_weights(self, first: Expr, p: list[Expr], rescale: Expr, unit: Expr) -> None:
        """What `_add_values` needs of the head; the row of bos leaves p."""
        of_bos: Any = T.uint32(0)
        if self.form.kv_bits == 3:
            is_bos = T.bind(T.And(first == 0, self.lane == 0))
            level = T.bind(T.Select(is_bos, p[0], 0))
            p, of_bos = [T.bind(p[0] - level), p[1]], T.reinterpret("uint32", level)
        bias = T.bind(cuda.warp_count(T.bind(p[0] + p[1])) * qmax(self.form.kv_bits))
        for half in range(2):
            quad = self._quad(p[half])
            with cuda.when(self.lane % 4 == 0):
                at = self.of_head(self.h, P + half * KEYS // 2) + cuda.offset(self.lane)
                cuda.ptx("st.shared.b32", at, quad)
        with cuda.when(self.lane == 0):
            cuda.ptx("st.shared.v2.f64", self.of_head(self.h, FACTORS), rescale, unit)
            at = self.of_head(self.h, OFFSETS)
            cuda.ptx("st.shared.v2.b32", at, T.reinterpret("uint32", bias), of_bos)

    def _quad(self, p: Expr) -> Expr:
        """p of the four lanes of a group in one word."""
        word = T.bind(T.cast(p, "uint32") << T.cast(self.lane % 4 * 8, "uint32"))
        for step in (1, 2):
            word = T.bind(word | cuda.shuffle_xor(word, step))
        return word

    def _add_values(self) -> None:
        """o = o * rescale + (sum of p[t] v[t]) * unit"""
        form, heads = self.form, self.form.heads
        each = form.columns * form.fields
        sums = cuda.local("uint32", heads * each)
        for i in range(heads * each):
            cuda.store(sums, T.uint32(0), i)
        quads, weights = QUADS // heads, cuda.local("uint32", heads)
        with T.serial(quads) as step:
            i = T.bind(self.group * quads + step)
            for h in range(heads):
                at = self.of_head(h, P) + cuda.offset(4 * i)
                cuda.ptx("ld.shared.b32", weights[h], at)
            for column in range(form.columns):
                self._add_quad(sums, weights, 4 * i, column)
        self._scatter(sums, each)
        factors, offsets = cuda.local("float64", 2), cuda.local("uint32", 2)
        at = self.of_head(self.group, 0)
        cuda.ptx("ld.shared.v2.f64", factors[0], factors[1], at + T.uint32(FACTORS))
        cuda.ptx("ld.shared.v2.b32", offsets[0], offsets[1], at + T.uint32(OFFSETS))
        bias, of_bos = (T.reinterpret("int32", offsets[i]) for i in range(2))
        for column in range(form.columns):
            for f in range(form.fields):
                at = column * form.fields + f
                total = T.reinterpret("int32", sums[at]) - bias
                if form.kv_bits == 3:
                    total = total + of_bos * self._bos_level(self.dim_of(column, f))
                cuda.store(
                    self.o, self.o[at] * factors[0] + T.cast(total, "float64") * factors[1], at
                )

    def _scatter(self, sums, each: int) -> None:
        """sums[:each] = the lane's head's, over all positions: lanes swap half of their heads for
        the same ones of the other's."""
        kept = self.form.heads
        while kept > 1:
            kept //= 2
            lanes_apart = kept * (cuda.WARP // self.form.heads)
            is_upper = T.bind(self.lane // lanes_apart % 2 == 1)
            for i in range(kept * each):
                low, high = T.bind(sums[i]), T.bind(sums[kept * each + i])
                other = cuda.shuffle_xor(T.bind(T.Select(is_upper, low, high)), lanes_apart)
                cuda.store(sums, T.Select(is_upper, high, low) + other, i)

    def _add_quad(self, sums, weights, row: Expr, column: int) -> None:
        """sums += weights . the codes of four rows, in the lane's byte of the plane."""
        form, byte = self.form, self.byte_of(column)
        words = [self._gather(row, byte)]
        if form.kv_bits == 3:
            high_bytes = form.dim // 8
            high = self._gather(row, form.plane + byte % high_bytes)
            words.append(T.bind(high >> T.cast(byte // high_bytes, "uint32")))
        for f in range(form.fields):
            codes = T.bind(form.field(words, f))
            for h in range(form.heads):
                at = (h * form.columns + column) * form.fields + f
                cuda.store(sums, cuda.dp4a_unsigned(weights[h], codes, sums[at]), at)

    def _gather(self, row: Expr, byte: Expr) -> Expr:
        """Byte `byte` of four rows of values."""
        four = [T.bind(self.tile[self.at(self.unit, 1, row + r, byte // 4)]) for r in range(4)]
        which = T.bind(T.cast(byte % 4 * 17 + 64, "uint32"))  # that byte of one, of the other
        low, high = (cuda.byte_permute(a, b, which) for a, b in (four[:2], four[2:]))
        return T.bind(cuda.byte_permute(low, high, 0x5410))

    def is_byte(self, column: int) -> Expr:
        """Whether the lane has a byte there."""
        form = self.form
        return self.place + column * (cuda.WARP // form.heads) < form.plane // form.heads

    def byte_of(self, column: int) -> Expr:
        form = self.form
        share, lanes_of_head = form.plane // form.heads, cuda.WARP // form.heads
        return self.h * share + T.min(self.place + column * lanes_of_head, share - 1)

    def dim_of(self, column: int, f: int) -> Expr:
        return self.byte_of(column) + f * self.form.plane

    def _bos_level(self, d: Expr) -> Expr:
        half = self.form.dim // 2
        word = self.bos[1, d % half // 4]
        shift = T.cast(d % half % 4 * 8 + d // half * 4, "uint32")
        return T.cast(word >> shift & T.uint32(15), "int32") - qmax(BOS_BITS)
