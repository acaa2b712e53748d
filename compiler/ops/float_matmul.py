"""float_matmul: a linear layer of the float baseline.

y[m, n] = sum_k x[m, k] w[n, k]        float32, in any order

tensor | shape  | dtype | meaning
x      | (M, K) | f32   |
w      | (N, K) | f16   | widened before the product
y      | (M, N) | f32   |
"""

from compiler.op import OpDef
from compiler.signature import parse

float_matmul = OpDef(
    name="float_matmul",
    tensors=parse("x f32[M, K]", "w f16[N, K]"),
    results=parse("f32[M, N]"),
    schedules="float_matmul",
    kernel=lambda schedule, size, _, target: schedule.kernel(size("N"), size("K"), target),
)
