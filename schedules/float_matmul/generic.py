"""float_matmul on any CPU: output-stationary, a row of float16 weights is widened once for all M.

    for n in N:                                  parallel
        wide[K] = float32(w[n, :])               4 K bytes, in L1
        for m in M:
            acc[LANES] += x[m, :] * wide[:]      LANES sums that do not wait for each other
            out[m, n] = sum(acc)

    tile  | value               | bound by
    LANES | 4 * lanes(32)       | latency of an addition times additions a cycle
    wide  | K                   | L1: 10 KB at K = 2560

A float16 is widened by integer shifts and one exact multiplication, right for subnormals and on
processors without a conversion instruction; infinities and NaN do not occur in weights.
"""

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.targets import CpuTarget

EXPONENT_BIAS = 2.0**112  # 2 ** (127 - 15): float32's bias over float16's


def widen(half: Expr) -> Expr:
    bits = T.cast(T.reinterpret("uint16", half), "uint32")
    magnitude = T.reinterpret("float32", (bits & T.uint32(0x7FFF)) << T.uint32(13)) * T.float32(
        EXPONENT_BIAS
    )
    return T.reinterpret(
        "float32", T.reinterpret("uint32", magnitude) | (bits & T.uint32(0x8000)) << T.uint32(16)
    )


def kernel(n: int, k: int, target: CpuTarget) -> PrimFunc:
    lanes = 4 * target.lanes(32)
    whole = k // lanes * lanes
    rows = Var("M", "int64")

    @T.prim_func(s_tir=True)
    def float_matmul(
        x: T.Buffer((rows, k), "float32"),
        w: T.Buffer((n, k), "float16"),
        out: T.Buffer((rows, n), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            for j in T.parallel(n):
                wide = T.alloc_buffer((k,), "float32", scope="local")
                acc = T.alloc_buffer((lanes,), "float32", scope="local")
                for i in T.serial(k):
                    wide[i] = widen(w[j, i])
                for m in T.serial(rows):
                    for i in T.vectorized(lanes):
                        acc[i] = T.float32(0)
                    for step in T.serial(whole // lanes):
                        for i in T.vectorized(lanes):
                            acc[i] += x[m, step * lanes + i] * wide[step * lanes + i]
                    total = T.float32(0)
                    for i in T.serial(lanes):
                        total += acc[i]
                    for i in T.serial(k - whole):
                        total += x[m, whole + i] * wide[whole + i]
                    out[m, j] = total

    return float_matmul
