"""sparse_ternary_matmul on any CPU: a block of 128 outputs stays, active columns stream past it.

    for b in N/128:                              parallel
        for m in M:
            acc[128] = 0                         int32, in L1
            for i in count[m]:                   any number, 0 to K
                acc[:] += q[m, index[m, i]] * unpack(w[index[m, i], b, :])   vectorised by LLVM
            out[m, 128 b :] = residual + acc * scale

    tile | value | bound by
    acc  | 128   | the layout: 32 bytes of a column

int32 holds |acc| <= 128 K for every K below 2**24.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES
from schedules.targets import CpuTarget


def layout() -> str:
    return "columns_2bit"


def kernel(n: int, k: int, target: CpuTarget) -> PrimFunc:
    end = EPILOGUES["residual"]
    blocks = -(-n // 128)
    rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def sparse_ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        index: T.Buffer((rows, k), "int32"),
        count: T.Buffer((rows,), "int32"),
        w: T.Buffer((k, blocks, 32), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            for b in T.parallel(blocks):
                acc = T.alloc_buffer((128,), "int32", scope="local")
                for m in T.serial(rows):
                    for j in T.serial(128):
                        acc[j] = 0
                    for i in T.serial(count[m]):
                        a = T.cast(q[m, index[m, i]], "int32")
                        for f in T.unroll(4):
                            for j in T.serial(32):
                                code = w[index[m, i], b, j] >> T.uint8(2 * f) & T.uint8(3)
                                acc[32 * f + j] += a * (T.cast(code, "int32") - 1)
                    for j in T.serial(T.min(128, n - 128 * b)):
                        out[m, 128 * b + j] = end.value(
                            T.cast(acc[j], "float32"),
                            scale[m] * w_scale[128 * b + j],
                            extra[m, 128 * b + j],
                        )

    return end.finish(sparse_ternary_matmul)
