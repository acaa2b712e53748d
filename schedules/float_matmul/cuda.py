"""float_matmul on CUDA: a warp an output, lanes over K; the float baseline, not tuned.

    for n, m in N/8, M:                  blockIdx.x, blockIdx.y; a warp a column n
        out[m, n] = sum_k x[m, k] * float32(w[n, k])      a lane every 32nd k, then shuffles

The definition allows any order and contraction.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.targets import GpuTarget

WARPS = 8


def kernel(n: int, k: int, target: GpuTarget) -> PrimFunc:
    rows = Var("M", "int64")

    def column(x, w, out, m, j, lane):
        acc = cuda.local("float32", 1)
        cuda.store(acc, T.float32(0), 0)
        with cuda.strided(k, lane, cuda.WARP) as i:
            cuda.store(acc, acc[0] + x[m, i] * T.cast(w[j, i], "float32"), 0)
        total = cuda.warp_reduce(acc[0], "sum")
        with cuda.when(lane == 0):
            cuda.store(out, total, m, j)

    @T.prim_func(s_tir=True)
    def float_matmul(
        x: T.Buffer((rows, k), "float32"),
        w: T.Buffer((n, k), "float16"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            with cuda.some_rows(rows):
                with cuda.blocks(rows) as m:
                    with cuda.blocks(-(-n // WARPS), "y") as b:
                        with cuda.threads(WARPS, "y") as warp:
                            with cuda.threads(cuda.WARP) as lane:
                                with cuda.when(b * WARPS + warp < n):
                                    column(x, w, out, m, b * WARPS + warp, lane)

    return float_matmul
