"""attention: every query row against the cache of its slot, up to its own position.

    16 bits: s[t] = (q . k[t]) / sqrt(D);  e[t] = exp(s[t] - max s);  y = sum e[t] v[t] / sum e[t]
    4 and 3: s[t] = (q8 . k[t]) k_scale[t] q_scale / sqrt(D)       q8, q_scale: INT8 absmax of q
             w[t] = e[t] v_scale[t];  unit = max w / 255 of each block of 64 positions
             y = sum over blocks of unit * sum over t of rint(w[t] / unit) v[t], over sum e[t]

t = 0..positions[m] of slot slots[m]; query head h reads key and value head h // (Hq / Hkv).
Products of levels are summed exactly in int32, the rest is float64, rounded to float32 once.

    tensor    | shape            | dtype   | meaning
    qkv       | (M, (Hq+2Hkv) D) | f32     | after rope; only the query heads are read
    codes     | (S, Hkv, 2, B)   | u8, f16 | the cache, this step's rows included
    scales    | (S, Hkv, 2, T)   | f16     |
    slots     | (M,)             | i64     | 0 <= slot < S
    positions | (M,)             | i64     | 0 <= position < T
    y         | (M, Hq D)        | f32     |
"""

from compiler.op import OpDef, Statics
from compiler.ops.heads import KV_BITS, check_cache, head_dim
from compiler.signature import Match, parse


def check(match: Match, statics: Statics) -> None:
    check_cache(match, statics)
    match.bind("A", int(statics["num_heads"]) * head_dim(match, statics), "qkv")


attention = OpDef(
    name="attention",
    tensors=parse(
        "qkv f32[M, W]",
        "codes any[S, G, 2, B]",
        "scales f16[S, G, 2, T]",
        "slots i64[M]",
        "positions i64[M]",
    ),
    statics={"num_heads": int, "num_kv_heads": int, "kv_bits": KV_BITS},
    results=parse("f32[M, A]"),
    schedules="attention",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        static["num_heads"], static["num_kv_heads"], size("D"), static["kv_bits"], target
    ),
    check=check,
)
