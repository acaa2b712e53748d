"""An online softmax on fragments of a tensor core: 64 dot products of 8 rows into bytes, float64.

    x = dot * key_scale                      exact: 18 and 11 bits
    z = rint(x c) - peak                     c = 64 log2(e) * what scales the row; peak whole
    e = 2^(z / 64) * e^(x c - peak - z)      table of 64, polynomial of degree 4: within 4e-15
    w = e * value_scale, unit = max w / 255, p = rint(w / unit)

A row's peak is any number near its largest score: weights, unit and total scale alike, and float64
is wide. While the largest score that a block's scales allow is below 2^CALM, the peak is 0 and
nothing is looked for. From the first block beyond that on, peaks follow the scores: kept a multiple
of 64, so that what was summed so far is rescaled by a power of two, exactly, and moved only when a
score is beyond by 2^64. Positions that a row does not see, and then scores too low to count, are
bits of a word by which their weights become 0.

Products with the inverse of a unit, and sums contracted with products, differ from the definition's
in ties only. A float64 of fixed exponent is rounded to a whole number, and read, in its low bits.

A lane has 8 neighbouring positions of two rows; lanes of the same remainder by 4 share their rows.
"""

import math
from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from schedules.attention.softmax import SMALLEST_UNIT
from schedules.intrin import cuda
from schedules.intrin.exp import ROUND_MAGIC

KEYS = 64  # that share a unit
HIGHEST = 20 * KEYS
SCALE_BYTES = HIGHEST + 16  # of a block: float32 of keys; float64 of keys, of values; the highest
STEPS = 64  # of the table: between powers of two
COPIES = 16  # of the table, for the banks of shared memory
LANE_KEYS = 8  # neighbours
ALL_KEYS = (1 << LANE_KEYS) - 1
ROWS = 2  # of a lane
SCORES = ROWS * LANE_KEYS
HIGH_WORD = 0x43300000  # of the float64 2^52 + low word
SIGN = 1 << 31
CALM = 440.0 * STEPS  # of z, whichever its sign: sums and products stay normal float64s
QMAX = 7  # the largest level: a cache of 3 bits has a row of 4
LOWEST = -1015 * STEPS  # of z: the result is a normal float64
MOST_POWER = 1000  # by which sums are rescaled
SLACK = 64.0 * STEPS  # that a score may exceed its peak by
FAR = -3e38  # a float32 below every score's


def polynomial(reach: float, scale: float) -> list[float]:
    """c[k] r^k, k = 1 .. 4, is e^(scale r) - 1 for |r| <= reach; r^5 is told apart by Chebyshev."""
    c = [scale**k / math.factorial(k) for k in range(6)]
    c[3] += c[5] * 20 / 16 * reach**2
    c[1] -= c[5] * 5 / 16 * reach**4
    return c[1:5]


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    return T.call_pure_extern("float64", "fma", a, b, c)


def from_words(high: Expr | int, low: Expr) -> Expr:
    return T.call_pure_extern("float64", "__hiloint2double", high, low)


def low_word(value: Expr) -> Expr:
    return T.call_pure_extern("int32", "__double2loint", value)


def high_word(value: Expr) -> Expr:
    return T.call_pure_extern("int32", "__double2hiint", value)


def whole(value: Expr) -> Expr:
    """float64 of an int32, which comes as uint32."""
    return T.cast(T.reinterpret("int32", value), "float64")


def over_keys(value: Expr, fold) -> Expr:
    """Over the eight lanes that share a row."""
    for lanes in (4, 8, 16):
        value = T.bind(value)
        other = T.bind(cuda.shuffle_xor(value, lanes))
        value = T.bind(fold(value, other))
    return value


def larger(a: Expr, b: Expr) -> Expr:
    """max of float64 without CUDA's care for NaN."""
    return T.Select(a > b, a, b)


class Softmax:
    """Two rows of a lane; emits a block's step."""

    def __init__(self, dim: int, lane: Expr, t: Expr, num_threads: int):
        self.dim, self.lane = dim, lane
        self.table = cuda.shared("float64", STEPS, COPIES)
        self.scales = cuda.local("float64", 4)  # of keys or values
        self.c = cuda.local("float64", ROWS)
        self.shift = cuda.local("float64", ROWS)  # ROUND_MAGIC - peak
        self.total = cuda.local("float64", ROWS)
        self.unit = cuda.local("float64", ROWS)
        self.peak = cuda.local("float32", ROWS)
        self.seen = cuda.local("int32", ROWS)
        self.is_calm = cuda.local("bool", 1)
        self.limit = cuda.local("float32", 1)  # of a key's scale while the peak is 0
        self.hidden = cuda.local("uint32", ROWS)  # bit i: the lane's position i counts for nothing
        self.dots = cuda.local("uint32", SCORES)
        self.w = cuda.local("float64", SCORES)
        self.p = cuda.local("uint32", SCORES // 4)
        self.o = cuda.local("float64", dim // 4)
        with cuda.strided(STEPS * COPIES, t, num_threads) as i:
            value = T.exp2(T.cast(i // COPIES, "float64") * T.float64(1 / STEPS))
            cuda.store(self.table, value, i // COPIES, i % COPIES)

    def start(self, factors: Sequence[Expr], seen: Sequence[Expr]) -> None:
        """Of two rows whose scores are x * factor, for their first `seen` positions."""
        for row in range(ROWS):
            c = T.bind(factors[row] * cuda.float64(STEPS / math.log(2)))
            cuda.store(self.c, c, row)
            cuda.store(self.seen, seen[row], row)
            cuda.store(self.shift, T.float64(ROUND_MAGIC), row)
            cuda.store(self.total, T.float64(0), row)
            cuda.store(self.peak, T.float32(0), row)
        with cuda.unrolled(self.dim // 4) as i:
            cuda.store(self.o, T.float64(0), i)
        largest = T.max(T.cast(self.c[0], "float32"), T.cast(self.c[1], "float32"))
        largest = cuda.warp_reduce(largest * T.float32(127 * QMAX * self.dim), "max")
        cuda.store(self.limit, T.float32(CALM) / largest, 0)
        cuda.store(self.is_calm, T.bool(True), 0)

    @staticmethod
    def index(i: Expr | int, row: int) -> Expr | int:
        """In fragments, of the lane's i-th position or column: rows take turns."""
        return ROWS * i + row

    def step(self, first: Expr, scales: Expr) -> None:
        """dots of positions first .. first + 63 -> p, unit; o and total rescaled to their peak.

        `scales`: where those of the block are, as `store_scale` leaves them.
        """
        of_lane = T.bind(self.lane // 4 * LANE_KEYS)
        keys = T.bind(scales + T.cast(4 * KEYS + 8 * of_lane, "uint32"))
        for row in range(ROWS):
            count = T.max(T.min(self.seen[row] - first - of_lane, LANE_KEYS), 0)
            unseen = T.uint32(ALL_KEYS) << T.cast(count, "uint32") & T.uint32(ALL_KEYS)
            cuda.store(self.hidden, unseen, row)
        highest = cuda.local("float32", 2)
        cuda.ptx("ld.shared.v2.f32", highest[0], highest[1], scales + T.uint32(HIGHEST))
        is_below = T.max(highest[0], highest[1]) <= self.limit[0]
        cuda.store(self.is_calm, tirx.all(self.is_calm[0], is_below), 0)
        with cuda.when(cuda.warp_any(tirx.Not(self.is_calm[0]))):
            self._find_peaks(first == 0, scales + T.cast(4 * of_lane, "uint32"))
        self._weigh(keys)
        self._quantize()

    @staticmethod
    def store_scale(scales: Expr, i: Expr, scale: Expr) -> None:
        """float32 of the i-th key, or value if i >= KEYS; i < 2 KEYS, whole warps."""
        at = scales + T.cast(8 * i, "uint32") + T.uint32(4 * KEYS)
        cuda.ptx("st.shared.f64", at, T.cast(scale, "float64"))
        with cuda.when(i < KEYS):
            cuda.ptx("st.shared.f32", scales + T.cast(4 * i, "uint32"), scale)
            highest = cuda.warp_reduce(scale, "max")
            half = scales + T.cast(HIGHEST + i // cuda.WARP * 4, "uint32")
            cuda.ptx("st.shared.f32", half, highest)

    def _find_peaks(self, is_first: Expr, scales: Expr) -> None:
        """Peaks that follow the scores, which are too large for 0; `hidden` gets those too low."""
        four, x = cuda.local("float32", 4), cuda.local("float32", SCORES)
        tops = cuda.local("float32", ROWS)
        for row in range(ROWS):
            cuda.store(tops, T.float32(FAR), row)
        with cuda.unrolled(LANE_KEYS // 4) as quad:
            registers = [four[i] for i in range(4)]
            cuda.ptx("ld.shared.v4.f32", *registers, scales + T.cast(16 * quad, "uint32"))
            for i in range(4):
                for row in range(ROWS):
                    at = self.index(4 * quad + i, row)
                    dot = T.cast(T.reinterpret("int32", self.dots[at]), "float32")
                    is_hidden = self._is_hidden(4 * quad + i, row)
                    cuda.store(x, T.Select(is_hidden, T.float32(FAR), dot * four[i]), at)
                    cuda.store(tops, T.max(tops[row], x[at]), row)
        for row in range(ROWS):
            c = T.bind(T.cast(self.c[row], "float32"))
            score = T.bind(over_keys(tops[row], T.max) * c)
            with cuda.when(tirx.any(is_first, score > self.peak[row] + T.float32(SLACK))):
                self._move_peak(row, score)
            low = T.bind((self.peak[row] + T.float32(LOWEST)) / c)
            with cuda.unrolled(LANE_KEYS) as i:
                bit = T.cast(x[self.index(i, row)] < low, "uint32") << T.cast(i, "uint32")
                cuda.store(self.hidden, self.hidden[row] | bit, row)

    def _is_hidden(self, i: Expr | int, row: int) -> Expr:
        return (self.hidden[row] >> T.cast(i, "uint32") & T.uint32(1)) != T.uint32(0)

    def _move_peak(self, row: int, score: Expr) -> None:
        steps = T.float32(STEPS)
        new = T.bind(T.ceil(T.max(score, T.float32(-1e30)) / steps) * steps)
        power = T.max((self.peak[row] - new) / steps, T.float32(LOWEST / STEPS))
        power = T.cast(T.min(power, T.float32(MOST_POWER)), "int32")
        rescale = T.bind(from_words(T.shift_left(power + 1023, 20), 0))
        cuda.store(self.peak, new, row)
        cuda.store(self.shift, T.float64(ROUND_MAGIC) - T.cast(new, "float64"), row)
        cuda.store(self.total, self.total[row] * rescale, row)
        with cuda.unrolled(self.dim // 8) as i:
            at = self.index(i, row)
            cuda.store(self.o, self.o[at] * rescale, at)

    def _weigh(self, scales: Expr) -> None:
        """w: first e, of which the total is, then e * value_scale."""
        scale = [self.scales[i] for i in range(4)]

        def load(quad: Expr, offset: int) -> None:
            for i in range(2):
                at = scales + T.cast(32 * quad + (offset + 16 * i), "uint32")
                cuda.ptx("ld.shared.v2.f64", scale[2 * i], scale[2 * i + 1], at)

        with cuda.unrolled(LANE_KEYS // 4) as quad:
            load(quad, 0)
            for i in range(4):
                for row in range(ROWS):
                    at = self.index(4 * quad + i, row)
                    x = T.bind(whole(self.dots[at]) * scale[i])  # 18 and 11 bits: exact
                    cuda.store(self.w, self._exp(x, row), at)
        with cuda.when(cuda.warp_any((self.hidden[0] | self.hidden[1]) != T.uint32(0))):
            with cuda.unrolled(LANE_KEYS) as i:
                for row in range(ROWS):
                    at = self.index(i, row)
                    e = T.Select(self._is_hidden(i, row), T.float64(0), self.w[at])
                    cuda.store(self.w, e, at)
        with cuda.unrolled(LANE_KEYS // 4) as quad:
            load(quad, 8 * KEYS)
            for i in range(4):
                for row in range(ROWS):
                    at = self.index(4 * quad + i, row)
                    cuda.store(self.total, self.total[row] + self.w[at], row)
                    cuda.store(self.w, self.w[at] * scale[i], at)

    def _exp(self, x: Expr, row: int) -> Expr:
        """e^(x * factor) on the scale of the row's peak."""
        z = T.bind(fma(x, self.c[row], self.shift[row]))
        r = T.bind(fma(x, self.c[row], self.shift[row] - z))
        n = T.bind(low_word(z))
        entry = T.bind(self.table[n & (STEPS - 1), self.lane % COPIES])
        power = T.shift_left(T.shift_right(n, 6), 20)  # to the exponent's place, 64 = 2^6
        scale = T.bind(from_words(high_word(entry) + power, low_word(entry)))
        c = [cuda.float64(value) for value in polynomial(0.5, math.log(2) / STEPS)]
        p = fma(fma(fma(c[3], r, c[2]), r, c[1]), r, c[0])
        return T.bind(fma(scale, T.bind(p * r), scale))

    def _quantize(self) -> None:
        """w to bytes, four positions of row l / 4 a word: what the values' product takes."""
        tops, factors = cuda.local("float64", ROWS), cuda.local("float64", ROWS)
        for row in range(ROWS):
            cuda.store(tops, self.w[row], row)
        with cuda.unrolled(LANE_KEYS - 1) as i:
            for row in range(ROWS):
                cuda.store(tops, larger(self.w[self.index(i + 1, row)], tops[row]), row)
        for row in range(ROWS):
            unit = T.bind(over_keys(tops[row], larger) * cuda.float64(1 / 255))
            cuda.store(self.unit, unit, row)
            divisor = T.bind(unit + cuda.float64(SMALLEST_UNIT))  # of a block of zeros
            cuda.store(factors, cuda.reciprocal(divisor), row)
        with cuda.unrolled(LANE_KEYS // 2) as j:
            pairs = []
            for row in range(ROWS):
                p = [self._byte(self.w[self.index(2 * j + i, row)], factors[row]) for i in range(2)]
                pairs.append(T.bind(cuda.byte_permute(p[0], p[1], 0x40)))
            word = T.bind(cuda.byte_permute(pairs[0], pairs[1], 0x5410))
            cuda.store(self.p, cuda.transpose_matrix(word), j)

    @staticmethod
    def _byte(w: Expr, factor: Expr) -> Expr:
        """rint(w factor) in the lowest byte."""
        nearest = low_word(fma(w, factor, T.float64(ROUND_MAGIC)))
        return T.bind(T.reinterpret("uint32", nearest))

    def add(self, sums: Buffer, tile: Expr) -> None:
        """o += unit * sums, a fragment of 16 columns. Sums become low words of 2^52 and more:
        conversions alone would hold up what waits for them."""
        for i in range(4):
            at = 4 * tile + i
            low = T.bitwise_xor(sums[i], T.uint32(SIGN))
            wide = from_words(HIGH_WORD, low) - cuda.float64(2.0**52 + SIGN)
            cuda.store(self.o, fma(wide, self.unit[i % 2], self.o[at]), at)

    def inverse_total(self, row: int) -> Expr:
        return T.bind(T.float64(1) / over_keys(self.total[row], lambda a, b: a + b))
