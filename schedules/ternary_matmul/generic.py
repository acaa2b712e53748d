"""ternary_matmul on any CPU: output-stationary, a row of weights is unpacked once for all of M.

    for n in N:                                  parallel
        code[K] = unpack(w[n, :])                K bytes, in L1
        for m in M:
            acc = sum_k q[m, k] * code[k]        int32, vectorised by LLVM
            out[m, n] = epilogue(acc)

    tile | value | bound by
    code | K     | L1: one row of weights as bytes

int32 holds |acc| <= 128 K for every K below 2**24.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES
from schedules.targets import CpuTarget


def layout(act_bits: int, epilogue: str = "scale") -> str:
    return "rows_2bit"


def kernel(n: int, k: int, act_bits: int, target: CpuTarget, epilogue: str) -> PrimFunc:
    end = EPILOGUES[epilogue]
    quads = -(-k // 4)
    rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def ternary_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((n, quads), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        extra: T.Buffer((rows, n), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            for j in T.parallel(n):
                code = T.alloc_buffer((4 * quads,), "int8", scope="local")
                for b in T.serial(quads):
                    for i in T.unroll(4):
                        code[4 * b + i] = T.cast(
                            w[j, b] >> T.uint8(2 * i) & T.uint8(3), "int8"
                        ) - T.int8(1)
                for m in T.serial(rows):
                    acc = T.int32(0)
                    for i in T.serial(k):
                        acc += T.cast(q[m, i], "int32") * T.cast(code[i], "int32")
                    out[m, j] = end.value(
                        T.cast(acc, "float32"), scale[m] * w_scale[j], extra[m, j]
                    )

    return end.finish(ternary_matmul)
