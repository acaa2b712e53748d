"""ternary_residual_matmul: sparse_ternary_matmul that reads no list; DropUnreadLists makes it.

    acc[m, n] = sum_k q[m, k] w[n, k]                                        exact, int32
    y[m, n]   = residual[m, n] + acc * (scale[m] * w_scale[n])               float32, FMA allowed

    tensor   | shape  | dtype | meaning
    q        | (M, K) | int8  |
    scale    | (M,)   | f32   | one a row of q
    w        | (N, K) | int8  | {-1, 0, 1}; uint8 in the kernel's layout after PackWeights
    w_scale  | (N,)   | f32   | one an output
    residual | (M, N) | f32   |
    y        | (M, N) | f32   |

|acc| <= 128 K: int32 holds every K < 2**24.
"""

from compiler.op import OpDef
from compiler.signature import parse

ACT_BITS = 8

ternary_residual_matmul = OpDef(
    name="ternary_residual_matmul",
    tensors=parse(
        "q i8[M, K]", "scale f32[M]", "w i8[N, K]", "w_scale f32[N]", "residual f32[M, N]"
    ),
    results=parse("f32[M, N]"),
    schedules="ternary_matmul",
    kernel=lambda schedule, size, _, target: schedule.kernel(
        size("N"), size("K"), ACT_BITS, target, epilogue="residual"
    ),
    weight="w",
    layout=lambda schedule, _: schedule.layout(ACT_BITS),
)
