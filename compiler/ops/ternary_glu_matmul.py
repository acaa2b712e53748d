"""ternary_glu_matmul: the up projection of a gate-first squared-ReLU GLU.

    g[m, n]   = max(gate[m, n], 0)
    acc[m, n] = sum_k q[m, k] w[n, k]                        exact, int32
    y[m, n]   = (g * g) * (acc * (scale[m] * w_scale[n]))    float32

    tensor  | shape  | dtype | meaning
    q       | (M, K) | int8  | activations: [-8, 7] if act_bits is 4, any int8 if 8
    scale   | (M,)   | f32   | one a row of q
    w       | (N, K) | int8  | {-1, 0, 1}; uint8 in the kernel's layout after PackWeights
    w_scale | (N,)   | f32   | one an output
    gate    | (M, N) | f32   | the gate projection; where it is <= 0, w[n] need not be read
    y       | (M, N) | f32   |

|acc| <= 128 K: int32 holds every K < 2**24.
"""

from compiler.op import OpDef
from compiler.signature import parse

ternary_glu_matmul = OpDef(
    name="ternary_glu_matmul",
    tensors=parse("q i8[M, K]", "scale f32[M]", "w i8[N, K]", "w_scale f32[N]", "gate f32[M, N]"),
    statics={"act_bits": (4, 8)},
    results=parse("f32[M, N]"),
    schedules="ternary_matmul",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        size("N"), size("K"), static["act_bits"], target, epilogue="glu"
    ),
    weight="w",
    layout=lambda schedule, static: schedule.layout(static["act_bits"], "glu"),
)
