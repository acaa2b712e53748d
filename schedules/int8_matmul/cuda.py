"""int8_matmul on CUDA, the head: a warp a run of weight rows, lanes over K, dp4a.

    for n0, m0 in N/(W R), M/T:                      blockIdx.x, blockIdx.y
        for warp in W:                               R rows of weights each
            for chunk in K/512:                      V bytes a lane
                x[T] = q[m0 : m0 + T, chunk]
                for r in R:
                    acc[R, T] += dp4a(x, w[n0 + r, chunk])
        out[T, R] = (sum over lanes) * scale

    tile | value                    | bound by
    V    | 16, 4 or 1: divides K    | 16 bytes a load
    T    | 1 or 4 tokens            | registers: R T accumulators, V T/4 activations
    R    | 4 rows                   | R loads in flight a lane; activations serve R rows

int32 holds |acc| <= 2**14 K for every K below 2**17.
"""

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES
from schedules.intrin import cuda
from schedules.targets import GpuTarget

WARPS = 8
ROWS = 4
TOKENS = 4
VECTORS = (16, 4, 1)  # bytes of a load


@dataclass(frozen=True)
class Form:
    n: int
    k: int
    tokens: int  # T

    @property
    def vector(self) -> int:
        return next(v for v in VECTORS if self.k % v == 0)

    @property
    def words(self) -> int:
        """int32 of a load; a lone byte is widened to one."""
        return max(1, self.vector // 4)


class Warp:
    """Emits a warp's work: R rows of weights from n0 on, T tokens from m0 on."""

    def __init__(self, form: Form, rows: Var, n0: Expr, m0: Expr, lane: Expr):
        self.form, self.rows, self.n0, self.m0, self.lane = form, rows, n0, m0, lane
        self.acc = cuda.local("int32", ROWS * form.tokens)
        self.x = cuda.local("int32", form.tokens * form.words)
        self.y = cuda.local("int32", ROWS * form.words)

    def accumulate(self, q, w) -> None:
        form = self.form
        for i in range(ROWS * form.tokens):
            cuda.store(self.acc, T.int32(0), i)
        with cuda.strided(form.k // form.vector, self.lane, cuda.WARP) as i:
            for r in range(ROWS):
                self._load(w, T.min(self.n0 + r, form.n - 1), i, self.y, r)
            for m in range(form.tokens):
                self._load(q, T.min(self.m0 + m, self.rows - 1), i, self.x, m)
            for r in range(ROWS):
                for m in range(form.tokens):
                    for v in range(form.words):
                        self._multiply(r, m, v)

    def _load(self, source, row: Expr, i: Expr, into, which: int) -> None:
        """into[which] = V bytes of a row, from V i on."""
        words = self.form.words
        if self.form.vector == 1:
            cuda.store(into, T.cast(source[row, i], "int32"), which)
            return
        view = T.decl_buffer((source.shape[0], self.form.k // 4), "int32", data=source.data)
        with T.vectorized(words) as v:
            cuda.store(into, view[row, i * words + v], which * words + v)

    def _multiply(self, r: int, m: int, v: int) -> None:
        words, at = self.form.words, r * self.form.tokens + m
        a, b = self.x[m * words + v], self.y[r * words + v]
        is_byte = self.form.vector == 1
        cuda.store(self.acc, self.acc[at] + a * b if is_byte else cuda.dp4a(a, b, self.acc[at]), at)

    def finish(self, scale, w_scale, out) -> None:
        """A lane stores the output of its number."""
        form, end = self.form, EPILOGUES["scale"]
        for r in range(ROWS):
            for m in range(form.tokens):
                i, row, token = r * form.tokens + m, self.n0 + r, self.m0 + m
                total = cuda.warp_reduce(self.acc[i], "sum")
                with cuda.when(self.lane == i), cuda.when(row < form.n):
                    with cuda.when(token < self.rows):
                        s = scale[token] * w_scale[row]
                        cuda.store(out, end.value(T.cast(total, "float32"), s, None), token, row)


def launch(form: Form, rows: Var, q, scale, w, w_scale, out) -> None:
    with cuda.blocks(-(-form.n // (WARPS * ROWS))) as b:
        with cuda.blocks(T.ceildiv(rows, form.tokens), "y") as c:
            with cuda.threads(WARPS, "y") as warp:
                with cuda.threads(cuda.WARP) as lane:
                    n0, m0 = T.bind((b * WARPS + warp) * ROWS), T.bind(c * form.tokens)
                    work = Warp(form, rows, n0, m0, lane)
                    work.accumulate(q, w)
                    work.finish(scale, w_scale, out)


def kernel(n: int, k: int, target: GpuTarget) -> PrimFunc:
    rows = Var("M", "int64")

    def by_rows(*tensors):
        with T.If(rows == 1):
            with T.Then():
                launch(Form(n, k, 1), rows, *tensors)
            with T.Else():
                with cuda.some_rows(rows):
                    launch(Form(n, k, TOKENS), rows, *tensors)

    @T.prim_func(s_tir=True)
    def int8_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((n, k), "int8"),
        w_scale: T.Buffer((n,), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            by_rows(q, scale, w, w_scale, out)

    return int8_matmul
