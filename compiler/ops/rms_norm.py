"""rms_norm and its quantising forms: INT4 absmean, INT8 absmax, FP4 E2M1.

    rstd = float32(1 / sqrt(sum_k x[m, k]^2 / K + eps))       float64 inside
    h    = (x * rstd) * gain                                  float32

    rms_norm      | h
    rms_norm_int4 | q = clamp(rint(h * (sqrt(7) / beta)), -8, 7),     scale = beta / sqrt(7)
    rms_norm_int8 | q = clamp(rint(h * (127 / gamma)), -128, 127),    scale = gamma / 127
    rms_norm_fp4  | q = twice the E2M1 value nearest to h / (2 scale), scale = gamma / 12

    beta = max(mean |h|, 1e-5), gamma = max(max |h|, 1e-5), of the row

    tensor | shape  | dtype | meaning
    x      | (M, K) | f32   |
    gain   | (K,)   | f32   |
    q      | (M, K) | int8  |
    scale  | (M,)   | f32   | h is about q * scale

The float order is part of the definition (docs/architecture.md): the codes are equal bit for bit.
"""

from compiler.op import OpDef
from compiler.signature import parse


def define(name: str, quantizer: str | None) -> OpDef:
    return OpDef(
        name=name,
        tensors=parse("x f32[M, K]", "gain f32[K]"),
        statics={"eps": float},
        results=parse("i8[M, K]", "f32[M]") if quantizer else parse("f32[M, K]"),
        schedules="rms_norm",
        kernel=lambda schedule, size, static, target: schedule.kernel(
            quantizer, size("K"), static["eps"], target
        ),
    )


rms_norm = define("rms_norm", None)
rms_norm_int4 = define("rms_norm_int4", "int4")
rms_norm_int8 = define("rms_norm_int8", "int8")
rms_norm_fp4 = define("rms_norm_fp4", "fp4")
