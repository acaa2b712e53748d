"""int8_matmul: INT8 activations times INT8 weights, the head.

    acc[m, n] = sum_k q[m, k] w[n, k]              exact, int32
    y[m, n]   = acc * (scale[m] * w_scale[n])      float32

    tensor  | shape  | dtype | meaning
    q       | (M, K) | int8  | activations
    scale   | (M,)   | f32   | one a row of q
    w       | (N, K) | int8  | weights; the embedding table where the two are tied
    w_scale | (N,)   | f32   | one an output
    y       | (M, N) | f32   |

|acc| <= 2**14 K: int32 holds every K < 2**17.
"""

from compiler.op import OpDef
from compiler.signature import parse

int8_matmul = OpDef(
    name="int8_matmul",
    tensors=parse("q i8[M, K]", "scale f32[M]", "w i8[N, K]", "w_scale f32[N]"),
    results=parse("f32[M, N]"),
    schedules="int8_matmul",
    kernel=lambda schedule, size, _, target: schedule.kernel(size("N"), size("K"), target),
)
