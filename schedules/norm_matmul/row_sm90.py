"""A row's norm and its codes, on Hopper, by all warps of a block; each warp keeps its own columns.

    chunk d of warp w: columns 128 (D w + d) + 4 lane on, a word of four codes a lane

    x                        L2, once the launch before has ended
    rstd, mean of |h|        float64 sums: two products of the tensor core and a barrier each
    max |h|                  one instruction a warp and a barrier
    the `keep` largest       rms_norm_topk/histogram_cuda.py

Roots and quotients of float64 take as long as a warp's whole row. They are approximated to 2^-44
and 2^-51, which rounds to the float32 that the exact ones do unless the middle between two float32
is as near; then the exact ones are computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import cuda
from schedules.intrin import lanes_cuda as lanes
from schedules.rms_norm.generic import QUANTIZERS, SMALLEST_STAT, write_mean
from schedules.rms_norm_topk.histogram_cuda import Selection

VECTOR = 4  # columns of a lane and chunk
CHUNK = VECTOR * cuda.WARP
PARTIALS_BYTES = 8 * cuda.WARP  # a float64 a warp
LOST_BITS = 29  # of a float64's mantissa in float32
ROOT_MARGIN, MEAN_MARGIN = 1 << 12, 1 << 3  # of the approximations, in float64's last place
LARGEST = 1e30  # float32's range ends beyond


@dataclass(frozen=True)
class Row:
    """Emits the work on a row of K columns: D chunks for each of a block's warps."""

    k: int
    depth: int
    warps: int  # two or more
    warp: Expr
    lane: Expr
    partials: Expr  # shared memory of 2 PARTIALS_BYTES

    def chunk(self, d: int) -> Expr:
        return self.warp * self.depth + d

    def first(self, d: int) -> Expr:
        """The first of the lane's columns of chunk d."""
        return self.chunk(d) * CHUNK + self.lane * VECTOR

    def load(self, source: Callable[[Expr], Expr]) -> Any:
        """The lane's columns of a float32 row; zeros past K."""
        values = cuda.local("float32", VECTOR * self.depth)
        for d in range(self.depth):
            column = T.bind(self.first(d))
            for i in range(VECTOR):
                cuda.store(values, T.float32(0), VECTOR * d + i)
            with cuda.when(column < self.k):
                cuda.load_in_order(values, VECTOR * d, source(column), VECTOR)
        return values

    def sum(self, terms: list[Expr], use: int) -> Expr:
        """Of the float64 of all lanes and warps; `use` 0 or 1."""
        while len(terms) > 1:  # in pairs: an addition waits for the last
            pairs = zip(terms[::2], terms[1::2], strict=False)
            terms = [a + b for a, b in pairs] + terms[len(terms) // 2 * 2 :]
        return self._exchange(lanes.sum_float64(terms[0]), "f64", use, lanes.sum_float64)

    def max_abs(self, h: Any, use: int) -> Expr:
        """float32, of all |h|."""
        peak: Any = T.uint32(0)
        for i in range(VECTOR * self.depth):
            peak = T.max(peak, T.reinterpret("uint32", T.abs(h[i])))
        peak = self._exchange(lanes.max_uint32(T.bind(peak)), "b32", use, lanes.max_uint32)
        return T.reinterpret("float32", peak)

    def _exchange(self, of_warp: Expr, bits: str, use: int, reduce: Callable) -> Expr:
        """The warps' values reduced, known to every lane."""
        dtype = str(of_warp.ty.dtype)
        start, other = T.bind(self.partials + T.uint32(use * PARTIALS_BYTES)), cuda.local(dtype, 1)
        with cuda.when(self.lane == 0):
            cuda.ptx(f"st.shared.{bits}", start + cuda.offset(self.warp * 8), of_warp)
        cuda.sync()
        at = cuda.offset(T.min(self.lane, self.warps - 1) * 8)
        cuda.ptx(f"ld.shared.{bits}", other[0], start + at)
        return reduce(T.bind(T.Select(self.lane < self.warps, other[0], T.cast(0, dtype))))

    def quantize(
        self, source: Callable[[Expr], Expr], gains: Any, eps: float, quantizer: str,
        selection: Selection | None,
    ) -> tuple[list[Expr], Expr]:  # fmt: skip
        """(a word of four codes of each chunk, the scale)."""
        write_stat, to_scale, to_factor, to_code = QUANTIZERS[quantizer]
        h, count = self.load(source), VECTOR * self.depth
        wide = [T.bind(T.cast(h[i], "float64")) for i in range(count)]
        rstd = reciprocal_root(self.sum([value * value for value in wide], 0), self.k, eps)
        for i in range(count):
            cuda.store(h, h[i] * rstd * gains[i], i)
        if write_stat is write_mean:
            total = self.sum([T.cast(T.abs(h[i]), "float64") for i in range(count)], 1)
            stat = mean(total, self.k)
        else:
            stat = self.max_abs(h, 1)
        stat = T.bind(T.max(stat, T.float32(SMALLEST_STAT)))
        factor = T.bind(to_factor(stat))
        if selection:
            selection.mask(h, [self.first(i // VECTOR) + i % VECTOR for i in range(count)], stat)
        words = []
        for d in range(self.depth):
            word: Any = T.uint32(0)
            for i in range(VECTOR):
                code = T.reinterpret("uint8", to_code(h[VECTOR * d + i], factor))
                word = word | T.cast(code, "uint32") << T.uint32(8 * i)
            words.append(T.bind(word))
        return words, T.bind(to_scale(stat))


def reciprocal_root(total: Expr, k: int, eps: float) -> Expr:
    """float32(1 / sqrt(total / K + eps))"""
    exact = T.float64(1) / T.sqrt(total / T.float64(k) + cuda.float64(eps))
    square = T.bind(total * cuda.float64(1 / k) + cuda.float64(eps))
    start = cuda.local("float32", 1)
    cuda.ptx("rsqrt.approx.f32", start[0], T.cast(square, "float32"))
    root = T.bind(T.cast(start[0], "float64"))
    error = T.bind(T.float64(1) - square * root * root)
    near = T.bind(root + root * T.float64(0.5) * error)  # a step of Newton's: 2^-22 squared
    is_wide = T.Not(square < cuda.float64(LARGEST))  # a NaN too
    return to_float32(near, exact, T.Or(is_wide, is_between(near, ROOT_MARGIN)))


def mean(total: Expr, k: int) -> Expr:
    """float32(total / K)"""
    near = T.bind(total * cuda.float64(1 / k))
    return to_float32(near, total / T.float64(k), is_between(near, MEAN_MARGIN))


def is_between(value: Expr, margin: int) -> Expr:
    """Whether a float64 is as near as that to the middle between two float32."""
    lost = T.reinterpret("int64", value) & T.int64((1 << LOST_BITS) - 1)
    return T.abs(T.cast(lost, "int32") - T.int32(1 << LOST_BITS - 1)) < T.int32(margin)


def to_float32(near: Expr, exact: Expr, is_doubtful: Expr) -> Expr:
    chosen = cuda.local("float64", 1)
    cuda.store(chosen, near, 0)
    with cuda.when(is_doubtful):
        cuda.store(chosen, exact, 0)
    return T.bind(T.cast(chosen[0], "float32"))
