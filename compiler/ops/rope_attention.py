"""rope_attention: rope, kv_append and attention of a step's only row; FuseOneRow makes it of them.

    turned = rope(qkv, cos, sin, positions)
    codes, scales = kv_append(codes, scales, turned, slots, positions)        in place
    y = attention(turned, codes, scales, slots, positions)

tensor    | shape            | dtype | meaning
qkv       | (1, (Hq+2Hkv) D) | f32   | as projected
cos, sin  | (P, D/2)         | f32   |
codes     | (S, Hkv, 2, B)   | u8    | the packed cache; updated
scales    | (S, Hkv, 2, T)   | f16   | updated
slots     | (1,)             | i64   |
positions | (1,)             | i64   |
y         | (1, Hq D)        | f32   |
"""

from compiler.op import NEW, OpDef, Statics
from compiler.ops.heads import KV_BITS, check_cache
from compiler.signature import Match, parse


def check(match: Match, statics: Statics) -> None:
    check_cache(match, statics)
    match.bind("A", int(statics["num_heads"]) * match.static("D"), "qkv")


rope_attention = OpDef(
    name="rope_attention",
    tensors=parse(
        "qkv f32[1, W]",
        "cos f32[P, H]",
        "sin f32[P, H]",
        "codes any[S, G, 2, B]",
        "scales f16[S, G, 2, T]",
        "slots i64[1]",
        "positions i64[1]",
    ),
    statics={"num_heads": int, "num_kv_heads": int, "kv_bits": KV_BITS},
    results=parse("f32[1, A]", "any[S, G, 2, B]", "f16[S, G, 2, T]"),
    inplace=(NEW, 3, 4),
    schedules="rope_attention",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        static["num_heads"],
        static["num_kv_heads"],
        size("D"),
        size("P"),
        static["kv_bits"],
        target,
    ),
    check=check,
)
