"""rms_norm, alone or with a quantizer behind it, on CUDA: a block a row, the row in registers.

    for m in M:                          blockIdx.x
        x[P], gain[P] = row              threadIdx.x: a run of P neighbouring columns each, 16 bytes
        rstd = 1 / sqrt(sum / K + eps)   float64, one barrier
        stat = mean or max of |h|        one barrier; h = (x * rstd) * gain, two float32 products
        q[P] = quantize(h)

    tile | value                             | bound by
    P    | least multiple of 4 in which 512  | barriers, which cost more the more threads wait:
         | threads hold the row              | 4 up to K = 2048, 8 to 4096

nvcc contracts a product into a sum only in the float64 sums of squares, where the product is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.rms_norm.generic import QUANTIZERS, SMALLEST_STAT, write_mean
from schedules.targets import GpuTarget

VECTOR = 4  # float32 of one 16-byte load
MAX_THREADS = 512


@dataclass(frozen=True)
class Row:
    """Row m of K columns spread over a block's threads, `run` neighbours each."""

    k: int
    eps: float

    @property
    def run(self) -> int:
        return -(-self.k // (VECTOR * MAX_THREADS)) * VECTOR

    @property
    def threads(self) -> int:
        return -(-self.k // (self.run * cuda.WARP)) * cuda.WARP

    def first(self, t: Expr) -> Expr:
        return t * self.run

    def each(self, t: Expr, body: Callable[[Expr, Expr], None]) -> None:
        """body(i, column) for the thread's columns, those past K left out."""
        for i in range(self.run):
            column = self.first(t) + i
            if self.threads * self.run == self.k:
                body(i, column)
            else:
                with cuda.when(column < self.k):
                    body(i, column)

    def load(self, source: Callable[[Expr], Expr], t: Expr) -> Any:
        """The thread's columns of a float32 row; zeros past K."""
        values = cuda.local("float32", self.run)
        for i in range(self.run):
            cuda.store(values, T.float32(0), i)
        if self.k % VECTOR:
            self.each(t, lambda i, column: cuda.store(values, source(column), i))
            return values
        for i in range(0, self.run, VECTOR):
            with cuda.when(self.first(t) + i < self.k), T.vectorized(VECTOR) as v:
                cuda.store(values, source(self.first(t) + i + v), i + v)
        return values

    def store(self, out: Callable[[Expr, Expr], None], values: Any, t: Expr) -> None:
        """out(column, value) of the thread's columns, in vectors where K allows."""
        if self.k % VECTOR:
            self.each(t, lambda i, column: out(column, values[i]))
            return
        for i in range(0, self.run, VECTOR):
            with cuda.when(self.first(t) + i < self.k), T.vectorized(VECTOR) as v:
                out(self.first(t) + i + v, values[i + v])

    def normed(self, x: Any, gain: Any, m: Expr, t: Expr, scratch: cuda.Scratch) -> Any:
        """The thread's columns of h = (x * rstd) * gain; zeros past K."""
        h = self.load(lambda column: x[m, column], t)
        gains = self.load(lambda column: gain[column], t)
        squares = T.float64(0)
        for i in range(self.run):
            wide = T.cast(h[i], "float64")
            squares = squares + wide * wide
        total = scratch.reduce(squares, "sum")
        rms = T.sqrt(total / T.float64(self.k) + T.float64(self.eps))
        rstd = T.bind(T.cast(T.float64(1) / rms, "float32"))
        for i in range(self.run):
            cuda.store(h, h[i] * rstd * gains[i], i)
        return h

    def mean_abs(self, h: Any, scratch: cuda.Scratch) -> Expr:
        total = T.float64(0)
        for i in range(self.run):
            total = total + T.cast(T.abs(h[i]), "float64")
        total = scratch.reduce(total, "sum")
        return T.cast(total / T.float64(self.k), "float32")

    def max_abs(self, h: Any, scratch: cuda.Scratch) -> Expr:
        peak = T.float32(0)
        for i in range(self.run):
            peak = T.max(peak, T.abs(h[i]))
        return scratch.reduce(peak, "max")


def kernel(quantizer: str | None, k: int, eps: float, target: GpuTarget) -> PrimFunc:
    """quantizer None: (x, gain, h). 'int4', 'int8', 'fp4': (x, gain, q, scale)."""
    if quantizer is None:
        return _float_kernel(Row(k, eps))
    if quantizer not in QUANTIZERS:
        raise ValueError(f"rms_norm: no quantizer {quantizer!r}; has {[*QUANTIZERS]} and None")
    write_stat, to_scale, to_factor, to_code = QUANTIZERS[quantizer]
    row = Row(k, eps)
    rows = Var("M", "int64")

    def quantize_row(x, gain, q, scale, m, t):
        scratch = cuda.Scratch(t, row.threads)
        h = row.normed(x, gain, m, t, scratch)
        stat = (row.mean_abs if write_stat is write_mean else row.max_abs)(h, scratch)
        stat = T.bind(T.max(stat, T.float32(SMALLEST_STAT)))
        factor = T.bind(to_factor(stat))
        codes = cuda.local("int8", row.run)
        for i in range(row.run):
            cuda.store(codes, to_code(h[i], factor), i)
        row.store(lambda column, value: cuda.store(q, value, m, column), codes, t)
        with cuda.when(t == 0):
            cuda.store(scale, to_scale(stat), m)

    @T.prim_func(s_tir=True)
    def rms_norm(
        x: T.Buffer((rows, k), "float32"),
        gain: T.Buffer((k,), "float32"),
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            with cuda.some_rows(rows):
                with cuda.blocks(rows) as m:
                    with cuda.threads(row.threads) as t:
                        quantize_row(x, gain, q, scale, m, t)

    return rms_norm


def _float_kernel(row: Row) -> PrimFunc:
    k, rows = row.k, Var("M", "int64")

    def norm_row(x, gain, out, m, t):
        h = row.normed(x, gain, m, t, cuda.Scratch(t, row.threads))
        row.store(lambda column, value: cuda.store(out, value, m, column), h, t)

    @T.prim_func(s_tir=True)
    def rms_norm(
        x: T.Buffer((rows, k), "float32"),
        gain: T.Buffer((k,), "float32"),
        out: T.Buffer((rows, k), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            with cuda.some_rows(rows):
                with cuda.blocks(rows) as m:
                    with cuda.threads(row.threads) as t:
                        norm_row(x, gain, out, m, t)

    return rms_norm
