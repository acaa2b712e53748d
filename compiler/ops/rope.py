"""rope: rotary embedding of the query and key heads; the value heads are copied.

x1' = float32(x1 cos - x2 sin)      x1, x2: the halves of a head of size D
x2' = float32(x2 cos + x1 sin)      products and sums in float64

tensor    | shape            | dtype | meaning
qkv       | (M, (Hq+2Hkv) D) | f32   | query heads, key heads, value heads
cos, sin  | (P, D/2)         | f32   | one row a position
positions | (M,)             | i64   | 0 <= position < P
y         | like qkv         | f32   |
"""

from compiler.op import OpDef, Statics
from compiler.ops.heads import head_dim
from compiler.signature import Match, parse


def check(match: Match, statics: Statics) -> None:
    d = head_dim(match, statics)
    if 2 * match.static("H") != d:
        match.refuse(f"cos has {match.static('H')} columns, expected {d // 2}, half a head of qkv")


rope = OpDef(
    name="rope",
    tensors=parse("qkv f32[M, W]", "cos f32[P, H]", "sin f32[P, H]", "positions i64[M]"),
    statics={"num_heads": int, "num_kv_heads": int},
    results=parse("f32[M, W]"),
    schedules="rope",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        static["num_heads"], static["num_kv_heads"], size("D"), size("P"), target
    ),
    check=check,
)
