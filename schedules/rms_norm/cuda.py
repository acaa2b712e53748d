"""rms_norm, alone or with a quantizer behind it, on CUDA: a block a row, the row in registers.

    for m in M:                          blockIdx.x, the last row first
        x[P], gain[P] = row              threadIdx.x: P columns each, every T-th quad, 16 bytes
        rstd = 1 / sqrt(sum / K + eps)   float64, one barrier
        stat = mean or max of |h|        one barrier; h = (x * rstd) * gain, two float32 products
        q[P] = quantize(h)

    tile | value                             | bound by
    P    | least multiple of 4 in which 256  | registers: three blocks a multiprocessor, 83 KB of
         | threads hold the row; 512 in runs | rows on their way; in runs, what a thread lists

Last rows first: a prompt's GEMM writes them last, so that L2 has them still.

nvcc contracts a product into a sum only in the float64 sums of squares, where the product is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.intrin.lanes_cuda import max_float32, sum_float64
from schedules.rms_norm.generic import QUANTIZERS, SMALLEST_STAT, write_mean
from schedules.targets import GpuTarget

VECTOR = 4  # float32 of one 16-byte load
MAX_THREADS = {False: 256, True: 512}  # by in_runs


@dataclass(frozen=True)
class Row:
    """Row m of K columns spread over a block's threads, `run` each: every T-th quad, so that a
    warp's loads are whole lines; or, `in_runs`, neighbours.
    """

    k: int
    eps: float
    in_runs: bool = False

    @property
    def run(self) -> int:
        return -(-self.k // (VECTOR * MAX_THREADS[self.in_runs])) * VECTOR

    @property
    def threads(self) -> int:
        return -(-self.k // (self.run * cuda.WARP)) * cuda.WARP

    def column(self, t: Expr, i: int) -> Expr:
        """The thread's i-th; past K if it has fewer."""
        if self.in_runs:
            return t * self.run + i
        return (i // VECTOR * self.threads + t) * VECTOR + i % VECTOR

    def each(self, t: Expr, body: Callable[[Expr, Expr], None]) -> None:
        """body(i, column) for the thread's columns, those past K left out."""
        for i in range(self.run):
            column = self.column(t, i)
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
            column = self.column(t, i)
            with cuda.when(column < self.k), T.vectorized(VECTOR) as v:
                cuda.store(values, source(column + v), i + v)
        return values

    def store(self, out: Callable[[Expr, Expr], None], values: Any, t: Expr) -> None:
        """out(column, value) of the thread's columns, in vectors where K allows."""
        if self.k % VECTOR:
            self.each(t, lambda i, column: out(column, values[i]))
            return
        for i in range(0, self.run, VECTOR):
            column = self.column(t, i)
            with cuda.when(column < self.k), T.vectorized(VECTOR) as v:
                out(column + v, values[i + v])

    def normed(self, x: Any, gain: Any, m: Expr, t: Expr, scratch: cuda.Scratch) -> Any:
        """The thread's columns of h = (x * rstd) * gain; zeros past K."""
        h = self.load(lambda column: x[m, column], t)
        gains = self.load(lambda column: gain[column], t)
        squares = T.float64(0)
        for i in range(self.run):
            wide = T.cast(h[i], "float64")
            squares = squares + wide * wide
        total = scratch.reduce_by(sum_float64, squares)
        rms = T.sqrt(total / T.float64(self.k) + T.float64(self.eps))
        rstd = T.bind(T.cast(T.float64(1) / rms, "float32"))
        for i in range(self.run):
            cuda.store(h, h[i] * rstd * gains[i], i)
        return h

    def mean_abs(self, h: Any, scratch: cuda.Scratch) -> Expr:
        total = T.float64(0)
        for i in range(self.run):
            total = total + T.cast(T.abs(h[i]), "float64")
        total = scratch.reduce_by(sum_float64, total)
        return T.cast(total / T.float64(self.k), "float32")

    def max_abs(self, h: Any, scratch: cuda.Scratch) -> Expr:
        peak = T.float32(0)
        for i in range(self.run):
            peak = T.max(peak, T.abs(h[i]))
        return scratch.reduce_by(max_float32, peak)


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
                with cuda.blocks(rows) as b:
                    with cuda.threads(row.threads) as t:
                        quantize_row(x, gain, q, scale, T.bind(rows - 1 - b), t)

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
