"""kv_append: quantise, pack and store the key and value heads of new rows, in place.

    amax = max |x| of a head;  scale = float32(float16(amax / qmax)), at least 2**-14
    code = clamp(rint(x / scale), -qmax, qmax) + qmax        qmax = 7 at 4 bits, 3 at 3 bits

Position 0 is kept at 4 bits when kv_bits is 3; at 16 bits x is rounded to float16 instead.

    tensor    | shape            | dtype   | meaning
    codes     | (S, Hkv, 2, B)   | u8, f16 | the cache (compiler/ops/heads.py); updated
    scales    | (S, Hkv, 2, T)   | f16     | updated; unused at 16 bits
    qkv       | (M, (Hq+2Hkv) D) | f32     | after rope
    slots     | (M,)             | i64     | 0 <= slot < S
    positions | (M,)             | i64     | 0 <= position < T
"""

from compiler.op import OpDef
from compiler.ops.heads import KV_BITS, check_cache
from compiler.signature import parse

kv_append = OpDef(
    name="kv_append",
    tensors=parse(
        "codes any[S, G, 2, B]",
        "scales f16[S, G, 2, T]",
        "qkv f32[M, W]",
        "slots i64[M]",
        "positions i64[M]",
    ),
    statics={"num_heads": int, "num_kv_heads": int, "kv_bits": KV_BITS},
    results=parse("any[S, G, 2, B]", "f16[S, G, 2, T]"),
    inplace=(0, 1),
    schedules="kv_append",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        static["num_heads"], static["num_kv_heads"], size("D"), static["kv_bits"], target
    ),
    check=check_cache,
)
