"""rms_norm_topk_int8: norm, TopK mask, INT8 absmax, and the list of what is not zero.

h = rms_norm(x);  gamma = max(max |h|, 1e-5) of the whole row
q = clamp(rint(h * (127 / gamma)), -128, 127) for the k largest |h|, ties to the lower index,
    else 0;  scale = gamma / 127

tensor | shape  | dtype | meaning
x      | (M, K) | f32   |
gain   | (K,)   | f32   |
q      | (M, K) | int8  | dense
scale  | (M,)   | f32   |
index  | (M, K) | i32   | columns of non-zero q, rising; unspecified from count[m] on
count  | (M,)   | i32   | how many they are, at most k
"""

from compiler.op import OpDef, Statics
from compiler.signature import Match, parse


def check(match: Match, statics: Statics) -> None:
    if statics["k"] > match.static("K"):
        match.refuse(f"k is {statics['k']}, possible: 1 to K = {match.static('K')}")


rms_norm_topk_int8 = OpDef(
    name="rms_norm_topk_int8",
    tensors=parse("x f32[M, K]", "gain f32[K]"),
    statics={"eps": float, "k": int},
    results=parse("i8[M, K]", "f32[M]", "i32[M, K]", "i32[M]"),
    schedules="rms_norm_topk",
    kernel=lambda schedule, size, static, target: schedule.kernel(
        size("K"), static["k"], static["eps"], target
    ),
    check=check,
)
