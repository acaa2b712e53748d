"""glu_matmul: the gate and the up projection of a prompt's GLU at once; FusePrompts makes it.

    g[m, n] = max((sum_k q[m, k] gate[n, k]) * (scale[m] * gate_scale[n]), 0)
    y[m, n] = (g * g) * ((sum_k q[m, k] w[n, k]) * (scale[m] * w_scale[n]))      sums exact, int32

    tensor  | shape     | dtype | meaning
    q       | (M, K)    | int8  | any
    scale   | (M,)      | f32   | one a row of q
    gate, w | (A, B, C) | u8    | (N, K) in the layout `tiles_2bit`
    w_scale | (N,)      | f32   | one an output; gate_scale of the gate
    y       | (M, N)    | f32   |

Only targets with a kernel in schedules/glu_matmul/ meet it, after PackWeights.
"""

from compiler.op import OpDef
from compiler.ops.norm_matmul import check_layout
from compiler.signature import parse

glu_matmul = OpDef(
    name="glu_matmul",
    tensors=parse(
        "q i8[M, K]",
        "scale f32[M]",
        "gate uint8[A, B, C]",
        "gate_scale f32[N]",
        "w uint8[A, B, C]",
        "w_scale f32[N]",
    ),
    results=parse("f32[M, N]"),
    schedules="glu_matmul",
    kernel=lambda schedule, size, _, target: schedule.kernel(size("N"), size("K"), target),
    check=check_layout,
)
