"""int8_matmul on any CPU: output-stationary, a row of the table serves all of M while it is in L1.

    for n in N:                                  parallel
        for m in M:
            acc = sum_k q[m, k] * w[n, k]        int32, vectorised by LLVM
            out[m, n] = acc * (scale[m] * w_scale[n])

int32 holds |acc| <= 2**14 K for every K below 2**17.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES
from schedules.targets import CpuTarget


def kernel(n: int, k: int, target: CpuTarget) -> PrimFunc:
    end = EPILOGUES["scale"]
    rows = Var("M", "int64")

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
            for j in T.parallel(n):
                for m in T.serial(rows):
                    acc = T.int32(0)
                    for i in T.serial(k):
                        acc += T.cast(q[m, i], "int32") * T.cast(w[j, i], "int32")
                    out[m, j] = end.value(T.cast(acc, "float32"), scale[m] * w_scale[j], None)

    return int8_matmul
