"""sparse_ternary_matmul: mostly-zero INT8 activations times ternary weights, plus the residual.

    acc[m, n] = sum over k in index[m, :count[m]] of q[m, k] w[n, k]         exact, int32
    y[m, n]   = residual[m, n] + acc * (scale[m] * w_scale[n])               float32, FMA allowed

    tensor   | shape  | dtype | meaning
    q        | (M, K) | int8  | activations, dense; zero outside index
    scale    | (M,)   | f32   | one a row of q
    index    | (M, K) | i32   | columns of non-zero q, rising; unspecified from count[m] on
    count    | (M,)   | i32   | how many they are
    w        | (N, K) | int8  | {-1, 0, 1}; uint8 in the kernel's layout after PackWeights
    w_scale  | (N,)   | f32   | one an output
    residual | (M, N) | f32   |
    y        | (M, N) | f32   |

|acc| <= 128 K: int32 holds every K < 2**24.
"""

from compiler.op import OpDef
from compiler.signature import parse

sparse_ternary_matmul = OpDef(
    name="sparse_ternary_matmul",
    tensors=parse(
        "q i8[M, K]",
        "scale f32[M]",
        "index i32[M, K]",
        "count i32[M]",
        "w i8[N, K]",
        "w_scale f32[N]",
        "residual f32[M, N]",
    ),
    results=parse("f32[M, N]"),
    schedules="sparse_ternary_matmul",
    kernel=lambda schedule, size, _, target: schedule.kernel(size("N"), size("K"), target),
    weight="w",
    layout=lambda schedule, _: schedule.layout(),
)
