"""An online softmax on fragments of a tensor core: 64 dot products of 16 rows into bytes, float64.

    x = dot * key_scale                      exact: 18 and 11 bits
    z = rint(x c) - peak                     c = 64 log2(e) * what scales the row; peak whole
    e = 2^(z / 64) * e^(x c - peak - z)      table of 64, polynomial of degree 4: within 4e-15
    w = e * value_scale, unit = max w / 255, p = rint(w / unit)

A row's peak is any number near its largest score: weights, unit and total scale alike. It is kept
a multiple of 64, so that what was summed so far is rescaled by a power of two, exactly, and moves
only when a score is beyond it by 2^64, which is nearly never after the first block.

Products with the inverse of a unit, and sums contracted with products, differ from the definition's
in ties only. Conversions from and to float64 are slow; numbers are put into, and read from, the low
bits of one of fixed exponent. A dot product arrives with DOT_BIAS added, which also makes it the
mantissa of a float32. Scores that count for nothing get the lowest exponent: e is then about
1e-305, and p is 0.
"""

import math

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

from schedules.attention.softmax import SMALLEST_UNIT
from schedules.intrin import cuda
from schedules.intrin.exp import ROUND_MAGIC

KEYS = 64  # that share a unit
SCALE_BYTES = 20 * KEYS  # of a block: float32 of keys; float64 of keys, of values
STEPS = 64  # of the table: between powers of two
COPIES = 16  # of the table, for the banks of shared memory
GROUPS = 4  # of 16 positions, of which a lane has 4 neighbours
ROWS = 2  # of a lane
DOT_BIAS = 0x4B400000  # as float32: 1.5 * 2^23
HIGH_WORD = 0x43300000  # of the float64 2^52 + low word
SUM_BIAS = 1 << 30
LOWEST = -1015 * STEPS  # of z: the result is a normal float64
SLACK = 64.0 * STEPS  # that a score may exceed its peak by
NO_PEAK = -1e30
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


def quad(value: Expr, fold) -> Expr:
    """Over the four lanes that share a row."""
    for lanes in (1, 2):
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
        self.short_scales = cuda.local("float32", 4)
        self.scales = cuda.local("float64", 8)  # of four keys, of four values
        self.c = cuda.local("float64", ROWS)
        self.shift = cuda.local("float64", ROWS)  # ROUND_MAGIC - peak
        self.total = cuda.local("float64", ROWS)
        self.unit = cuda.local("float64", ROWS)
        self.short_c = cuda.local("float32", ROWS)
        self.peak = cuda.local("float32", ROWS)
        self.low = cuda.local("float32", ROWS)  # x that count for nothing are below
        self.seen = cuda.local("int32", ROWS)
        self.dots = cuda.local("uint32", 32)
        self.x = cuda.local("float32", 32)
        self.w = cuda.local("float64", 32)
        self.p = cuda.local("uint32", 8)
        self.o = cuda.local("float64", dim // 2)
        with cuda.strided(STEPS * COPIES, t, num_threads) as i:
            value = T.exp2(T.cast(i // COPIES, "float64") * T.float64(1 / STEPS))
            cuda.store(self.table, value, i // COPIES, i % COPIES)

    def start(self, row: int, factor: Expr, seen: Expr) -> None:
        """Of a row whose scores are x * factor, for its first `seen` positions."""
        c = T.bind(factor * cuda.float64(STEPS / math.log(2)))
        cuda.store(self.c, c, row)
        cuda.store(self.short_c, T.cast(c, "float32"), row)
        cuda.store(self.seen, seen, row)
        cuda.store(self.shift, T.float64(ROUND_MAGIC), row)
        cuda.store(self.total, T.float64(0), row)
        cuda.store(self.peak, T.float32(NO_PEAK), row)
        cuda.store(self.low, T.float32(NO_PEAK), row)
        with cuda.unrolled(self.dim // 4) as i:
            cuda.store(self.o, T.float64(0), self.sum_index(i, row))

    @staticmethod
    def sum_index(i: Expr | int, row: int) -> Expr | int:
        """Of a row's i-th column of o: fragments have 2 columns of each row in turn."""
        return i // 2 * 4 + 2 * row + i % 2

    @staticmethod
    def index(group: Expr, i: int, row: int) -> Expr:
        """In a fragment, of position 16 group + 4 c + i, c the lane's place in its quad."""
        return 8 * group + (i // 2 * 4 + 2 * row + i % 2)

    def step(self, first: Expr, scales: Expr) -> None:
        """dots of positions first .. first + 63 -> p, unit; o and total rescaled to their peak.

        `scales`: where those of the block are, as `store_scale` leaves them.
        """
        of_lane = self.lane % 4 * 4
        self._find_peaks(T.bind(first + of_lane), scales + T.cast(4 * of_lane, "uint32"))
        self._weigh(scales + T.cast(8 * of_lane, "uint32"))
        self._quantize()

    @staticmethod
    def store_scale(scales: Expr, i: Expr, scale: Expr) -> None:
        """float32 of the i-th key, or value if i >= KEYS; i < 2 KEYS."""
        at = scales + T.cast(8 * i, "uint32") + T.uint32(4 * KEYS)
        cuda.ptx("st.shared.f64", at, T.cast(scale, "float64"))
        with cuda.when(i < KEYS):
            cuda.ptx("st.shared.f32", scales + T.cast(4 * i, "uint32"), scale)

    def _find_peaks(self, first: Expr, scales: Expr) -> None:
        tops = cuda.local("float32", ROWS)
        for row in range(ROWS):
            cuda.store(tops, T.float32(FAR), row)
        is_edge = T.bind(first + KEYS > T.min(self.seen[0], self.seen[1]))
        with cuda.unrolled(GROUPS) as group:
            four = [self.short_scales[i] for i in range(4)]
            cuda.ptx("ld.shared.v4.f32", *four, scales + T.cast(64 * group, "uint32"))
            for i in range(4):
                bias = T.bind(four[i] * T.float32(-1.5 * 2**23))
                for row in range(ROWS):
                    at = self.index(group, i, row)
                    dot = T.reinterpret("float32", self.dots[at])
                    x = T.call_pure_extern("float32", "fmaf", dot, four[i], bias)
                    cuda.store(self.x, x, at)
            with cuda.when(is_edge):
                for i in range(4):
                    for row in range(ROWS):
                        at = self.index(group, i, row)
                        is_seen = first + (group * 16 + i) < self.seen[row]
                        cuda.store(self.x, T.Select(is_seen, self.x[at], T.float32(FAR)), at)
            for i in range(4):
                for row in range(ROWS):
                    cuda.store(tops, T.max(tops[row], self.x[self.index(group, i, row)]), row)
        scores = [T.bind(quad(tops[row], T.max) * self.short_c[row]) for row in range(ROWS)]
        is_beyond = [T.bind(scores[r] > self.peak[r] + T.float32(SLACK)) for r in range(ROWS)]
        for row in range(ROWS):
            with cuda.when(is_beyond[row]):
                self._move_peak(row, scores[row])

    def _move_peak(self, row: int, score: Expr) -> None:
        steps = T.float32(STEPS)
        new = T.bind(T.ceil(score / steps) * steps)
        power = T.max((self.peak[row] - new) / steps, T.float32(LOWEST / STEPS))
        rescale = T.bind(from_words(T.shift_left(T.cast(power, "int32") + 1023, 20), 0))
        cuda.store(self.peak, new, row)
        cuda.store(self.low, (new + T.float32(LOWEST)) / self.short_c[row], row)
        cuda.store(self.shift, T.float64(ROUND_MAGIC) - T.cast(new, "float64"), row)
        cuda.store(self.total, self.total[row] * rescale, row)
        with cuda.unrolled(self.dim // 4) as i:
            at = self.sum_index(i, row)
            cuda.store(self.o, self.o[at] * rescale, at)

    def _weigh(self, scales: Expr) -> None:
        scale = [self.scales[i] for i in range(8)]
        with cuda.unrolled(GROUPS) as group:
            for i in range(4):  # pairs of keys, then of values
                offset = 4 * KEYS + i // 2 * 8 * KEYS + i % 2 * 16
                at = scales + T.cast(128 * group + offset, "uint32")
                cuda.ptx("ld.shared.v2.f64", scale[2 * i], scale[2 * i + 1], at)
            for i in range(4):
                bias = T.bind(scale[i] * cuda.float64(-(2.0**52) - DOT_BIAS))  # 31, 11 bits: exact
                for row in range(ROWS):
                    at = self.index(group, i, row)
                    x = T.bind(fma(from_words(HIGH_WORD, self.dots[at]), scale[i], bias))
                    e = self._exp(x, self.x[at], row)
                    cuda.store(self.total, self.total[row] + e, row)
                    cuda.store(self.w, e * scale[4 + i], at)

    def _exp(self, x: Expr, short_x: Expr, row: int) -> Expr:
        """e^(x * factor) on the scale of the row's peak."""
        z = T.bind(fma(x, self.c[row], self.shift[row]))
        r = T.bind(fma(x, self.c[row], self.shift[row] - z))
        n = T.bind(T.Select(short_x < self.low[row], LOWEST, low_word(z)))
        entry = T.bind(self.table[n & (STEPS - 1), self.lane % COPIES])
        power = T.shift_left(n & -STEPS, 14)  # to the exponent's place, 64 = 2^6
        scale = T.bind(from_words(high_word(entry) + power, low_word(entry)))
        c = [cuda.float64(value) for value in polynomial(0.5, math.log(2) / STEPS)]
        p = fma(fma(fma(c[3], r, c[2]), r, c[1]), r, c[0])
        return T.bind(fma(scale, T.bind(p * r), scale))

    def _quantize(self) -> None:
        """w to bytes, four positions a word: the fragments that the values' product takes."""
        tops, factors = cuda.local("float64", ROWS), cuda.local("float64", ROWS)
        for row in range(ROWS):
            cuda.store(tops, T.float64(0), row)
        with cuda.unrolled(32) as i:
            cuda.store(tops, larger(self.w[i], tops[i // 2 % 2]), i // 2 % 2)
        for row in range(ROWS):
            unit = T.bind(quad(tops[row], larger) * cuda.float64(1 / 255))
            cuda.store(self.unit, unit, row)
            smallest = cuda.float64(SMALLEST_UNIT)
            cuda.store(factors, T.float64(1) / T.max(unit, smallest), row)
        with cuda.unrolled(GROUPS) as group:
            for row in range(ROWS):
                bytes_ = []
                for i in range(4):
                    w = self.w[self.index(group, i, row)]
                    whole = low_word(fma(w, factors[row], T.float64(ROUND_MAGIC)))
                    bytes_.append(T.bind(T.reinterpret("uint32", whole)))
                low = T.bind(cuda.byte_permute(bytes_[0], bytes_[1], 0x40))
                high = T.bind(cuda.byte_permute(bytes_[2], bytes_[3], 0x40))
                cuda.store(self.p, cuda.byte_permute(low, high, 0x5410), 2 * group + row)

    def add(self, sums: Buffer, columns: Expr) -> None:
        """o += unit * (sums - SUM_BIAS), a fragment of 8 columns."""
        for i in range(4):
            whole = from_words(HIGH_WORD, sums[i]) - cuda.float64(2.0**52 + SUM_BIAS)
            at = 4 * columns + i
            cuda.store(self.o, fma(whole, self.unit[i // 2], self.o[at]), at)

    def inverse_total(self, row: int) -> Expr:
        return T.bind(T.float64(1) / quad(self.total[row], lambda a, b: a + b))
