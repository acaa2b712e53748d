"""grouped_matmul on any CPU: a row of the table is unpacked once, to L1, for all rows of q.

    for n in N:                                  parallel
        codes[K] = code[n, :]                    int8, vectorised by LLVM
        for m in M:
            for group in K/64:
                acc += group_scale * sum_j q[m, 64 group + j] * codes[64 group + j]
            out[m, n] = acc * (scale[m] * w_scale[n])

Measured: not yet.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.epilogue import EPILOGUES
from schedules.grouped import GROUP, code, group_scale, row_bytes
from schedules.targets import CpuTarget


def kernel(n: int, k: int, bits: int, target: CpuTarget) -> PrimFunc:
    end = EPILOGUES["scale"]
    rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def grouped_matmul(
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        w: T.Buffer((n, row_bytes(k, bits)), "uint8"),
        w_scale: T.Buffer((n,), "float32"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            for row in T.parallel(n):
                codes = T.alloc_buffer((k,), "int8")
                for group, j in T.grid(k // GROUP, GROUP):
                    codes[GROUP * group + j] = T.cast(code(w, row, k, bits, group, j), "int8")
                for m in T.serial(rows):
                    acc = T.int32(0)
                    for group in T.serial(k // GROUP):
                        part = T.int32(0)
                        for j in T.serial(GROUP):
                            at = T.meta_var(GROUP * group + j)
                            part += T.cast(q[m, at], "int32") * T.cast(codes[at], "int32")
                        acc += part * group_scale(w, row, group)
                    out[m, row] = end.value(T.cast(acc, "float32"), scale[m] * w_scale[row], None)

    return grouped_matmul
