"""rms_norm_mask_int8: rms_norm_topk_int8 without its list; DropUnreadLists makes it of that, for
GPUs.

tensor | shape  | dtype | meaning
x      | (M, K) | f32   |
gain   | (K,)   | f32   |
q      | (M, K) | int8  | as rms_norm_topk_int8 has it; k < K
scale  | (M,)   | f32   |
"""

from compiler.op import OpDef, Statics
from compiler.signature import Match, parse


def check(match: Match, statics: Statics) -> None:
    if statics["k"] >= match.static("K"):
        match.refuse(f"k is {statics['k']}, possible: 1 to K - 1 = {match.static('K') - 1}")


rms_norm_mask_int8 = OpDef(
    name="rms_norm_mask_int8",
    tensors=parse("x f32[M, K]", "gain f32[K]"),
    statics={"eps": float, "k": int},
    results=parse("i8[M, K]", "f32[M]"),
    schedules="rms_norm_topk",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        size("K"), static["k"], static["eps"], target, is_listed=False
    ),
    check=check,
)
