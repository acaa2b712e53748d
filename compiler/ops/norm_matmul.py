"""norm_matmul, norm_glu_matmul, norm_residual_matmul: what FuseOneRow makes of a row's norm, its
quantiser and the ternary matmul behind; one row, one kernel, nothing stored between.

    q, scale = rms_norm_int4(x, gain) if act_bits is 4, rms_norm_int8 if 8;
               of norm_residual_matmul rms_norm_topk_int8(x, gain, k), all of them at k = K

    norm_matmul          | ternary_matmul(q, scale, w, w_scale)
    norm_glu_matmul      | ternary_glu_matmul(q, scale, w, w_scale, ternary_matmul(q, scale, gate))
    norm_residual_matmul | residual + ternary_matmul(q, scale, w, w_scale), rounded as
                         | sparse_ternary_matmul does

    tensor   | shape     | dtype | meaning
    x        | (1, K)    | f32   |
    gain     | (K,)      | f32   |
    w, gate  | (A, B, C) | u8    | (N, K) in the layout `tiles_2bit`
    w_scale  | (N,)      | f32   | one an output; gate_scale of the gate
    residual | (1, N)    | f32   |
    y        | (1, N)    | f32   |

Only targets with a kernel in schedules/norm_matmul/ meet them, after PackWeights.
"""

from compiler.op import OpDef, Statics
from compiler.signature import Match, parse, same_shape, show_type
from schedules.layouts import LAYOUTS

LAYOUT = LAYOUTS["tiles_2bit"]
QUANTIZERS = {4: "int4", 8: "int8"}


def check_layout(match: Match, statics: Statics) -> None:
    shape = LAYOUT.packed_shape(match.static("N"), match.static("K"))
    for name in ("w", "gate"):
        if name in match.types and not same_shape(match.types[name].shape, shape):
            match.refuse(
                f"{name} is {show_type(match.types[name])}, expected {LAYOUT.name} {shape}"
            )


norm_matmul = OpDef(
    name="norm_matmul",
    tensors=parse("x f32[1, K]", "gain f32[K]", "w uint8[A, B, C]", "w_scale f32[N]"),
    statics={"eps": float, "act_bits": (4, 8)},
    results=parse("f32[1, N]"),
    schedules="norm_matmul",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        size("N"), size("K"), QUANTIZERS[int(static["act_bits"])], static["eps"], target, "scale"
    ),
    check=check_layout,
)
norm_glu_matmul = OpDef(
    name="norm_glu_matmul",
    tensors=parse(
        "x f32[1, K]",
        "gain f32[K]",
        "gate uint8[A, B, C]",
        "gate_scale f32[N]",
        "w uint8[A, B, C]",
        "w_scale f32[N]",
    ),
    statics={"eps": float, "act_bits": (4, 8)},
    results=parse("f32[1, N]"),
    schedules="norm_matmul",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        size("N"), size("K"), QUANTIZERS[int(static["act_bits"])], static["eps"], target, "glu"
    ),
    check=check_layout,
)
norm_residual_matmul = OpDef(
    name="norm_residual_matmul",
    tensors=parse(
        "x f32[1, K]",
        "gain f32[K]",
        "w uint8[A, B, C]",
        "w_scale f32[N]",
        "residual f32[1, N]",
    ),
    statics={"eps": float, "k": int},
    results=parse("f32[1, N]"),
    schedules="norm_matmul",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        size("N"), size("K"), "int8", static["eps"], target, "residual", int(static["k"])
    ),
    check=check_layout,
)
