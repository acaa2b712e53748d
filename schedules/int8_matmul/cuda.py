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


def kernel(n: int, k: int, target: GpuTarget) -> PrimFunc:
    end = EPILOGUES["scale"]
    vector = next(v for v in VECTORS if k % v == 0)
    words = max(1, vector // 4)
    rows = Var("M", "int64")

    def load(source, row: Expr, i: Expr, into, at: int):
        """into[at : at + words] = bytes vector * i .. of a row; a lone byte is widened."""
        if vector == 1:
            cuda.store(into, T.cast(source[row, i], "int32"), at)
            return
        view = T.decl_buffer((source.shape[0], k // 4), "int32", data=source.data)
        with T.vectorized(words) as v:
            cuda.store(into, view[row, i * words + v], at + v)

    def multiply(a, b, acc):
        return acc + a * b if vector == 1 else cuda.dp4a(a, b, acc)

    def block(tokens: int, q, scale, w, w_scale, out, n0, m0, lane):
        acc = cuda.local("int32", ROWS * tokens)
        x, y = cuda.local("int32", tokens * words), cuda.local("int32", ROWS * words)
        for i in range(ROWS * tokens):
            cuda.store(acc, T.int32(0), i)
        with cuda.strided(k // vector, lane, cuda.WARP) as i:
            for r in range(ROWS):
                load(w, T.min(n0 + r, n - 1), i, y, r * words)
            for m in range(tokens):
                load(q, T.min(m0 + m, rows - 1), i, x, m * words)
            for r in range(ROWS):
                for m in range(tokens):
                    for v in range(words):
                        at = r * tokens + m
                        product = multiply(x[m * words + v], y[r * words + v], acc[at])
                        cuda.store(acc, product, at)
        for r in range(ROWS):
            for m in range(tokens):
                total = cuda.warp_reduce(acc[r * tokens + m], "sum")
                with cuda.when(lane == r * tokens + m), cuda.when(n0 + r < n):
                    with cuda.when(m0 + m < rows):
                        s = scale[m0 + m] * w_scale[n0 + r]
                        y_ = end.value(T.cast(total, "float32"), s, None)
                        cuda.store(out, y_, m0 + m, n0 + r)

    def launch(tokens: int, q, scale, w, w_scale, out):
        with cuda.blocks(-(-n // (WARPS * ROWS))) as b:
            with cuda.blocks(T.ceildiv(rows, tokens), "y") as c:
                with cuda.threads(WARPS, "y") as warp:
                    with cuda.threads(cuda.WARP) as lane:
                        n0, m0 = T.bind((b * WARPS + warp) * ROWS), T.bind(c * tokens)
                        block(tokens, q, scale, w, w_scale, out, n0, m0, lane)

    def by_rows(*tensors):
        with T.If(rows == 1):
            with T.Then():
                launch(1, *tensors)
            with T.Else():
                with cuda.some_rows(rows):
                    launch(TOKENS, *tensors)

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
