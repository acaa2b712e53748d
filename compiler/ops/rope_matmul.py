"""rope_matmul: a prompt's projection of queries, keys and values and their rotation in one call;
FusePrompts makes it of them.

    y = rope(ternary_matmul(q, scale, w, w_scale), cos, sin, positions)

tensor    | shape     | dtype | meaning
q         | (M, K)    | int8  | any
scale     | (M,)      | f32   | one a row of q
w         | (A, B, C) | u8    | (W, K) in the layout `tiles_2bit`, W = (Hq+2Hkv) D
w_scale   | (W,)      | f32   | one an output
cos, sin  | (P, D/2)  | f32   | one row a position
positions | (M,)      | i64   | 0 <= position < P
y         | (M, W)    | f32   |

Only targets with a kernel in schedules/rope_matmul/ meet it, after PackWeights.
"""

from compiler.op import OpDef, Statics
from compiler.ops.norm_matmul import LAYOUT
from compiler.ops.rope import check as check_heads
from compiler.signature import Match, parse, same_shape, show_type


def check(match: Match, statics: Statics) -> None:
    check_heads(match, statics)
    shape, w = LAYOUT.packed_shape(match.static("W"), match.static("K")), match.types["w"]
    if not same_shape(w.shape, shape):
        match.refuse(f"w is {show_type(w)}, expected {LAYOUT.name} {shape}")


rope_matmul = OpDef(
    name="rope_matmul",
    tensors=parse(
        "q i8[M, K]",
        "scale f32[M]",
        "w uint8[A, B, C]",
        "w_scale f32[W]",
        "cos f32[P, H]",
        "sin f32[P, H]",
        "positions i64[M]",
    ),
    statics={"num_heads": int, "num_kv_heads": int},
    results=parse("f32[M, W]"),
    schedules="rope_matmul",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        static["num_heads"], static["num_kv_heads"], size("D"), size("P"), size("K"), target
    ),
    check=check,
)
