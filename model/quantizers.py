"""The quantizers of BitNet b1.58 and a4.8: codes and scales, and straight-through versions.

Equations: arXiv 2411.04965 section 2 (S); [D] marks what this project decides where it is silent.
RoundClip(x, a, b) = min(max(round(x), a), b), round half to even [D]. Every mean and maximum is
clamped to at least EPSILON rather than having epsilon added [D: BitNet FAQ, transformers]. Rows
are the last dimension; a row is one token (one head of one token for the KV cache) and no row sees
another. All arithmetic is float32, except that a mean is a float64 sum of the float32 |x| divided
by n in float64 and rounded to float32 [D]: compiled kernels reproduce these functions bit for bit.

Each function takes a floating tensor [..., n] and returns (codes [..., n], scale float32 [..., 1])
with x ~ codes * scale. NaN and infinity raise ValueError unless `check` is false.
The `fake_*` functions return codes * scale with the gradient of the identity, mean in float32:
they differ from the exact ones where the two means round differently, by one float32 step.
"""

import torch
from torch import Tensor

from model.topk import topk_mask

__all__ = [
    "fake_fp4",
    "fake_int4",
    "fake_int8",
    "fake_kv",
    "fake_ternary",
    "fake_topk_int8",
    "fp4_e2m1",
    "int4_absmean",
    "int8_absmax",
    "kv_absmax",
    "kv_qmax",
    "ternary_absmean",
    "topk_int8",
    "topk_mask",
]

EPSILON = 1e-5
SQRT7 = 2.6457513110645906
FP4_MAX_CODE = 12  # codes are twice the grid value, 2 * 6
FP16_MIN_NORMAL = 6.103515625e-05
FP16_MAX = 65504.0


def ternary_absmean(w: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
    """W_t = RoundClip(W / alpha, -1, 1), alpha = mean|W| over the whole tensor (S, eq. 1-2).

    Returns int8 codes in {-1, 0, 1} of w's shape and alpha, float32 of shape [].
    """
    _check("ternary_absmean", w, check)
    codes, scale = _ternary(w.float(), torch.float64)
    return codes.to(torch.int8), scale


def int4_absmean(x: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
    """X_q = RoundClip(sqrt7 X / beta, -8, 7), X ~ beta/sqrt7 X_q, beta = mean|X| (S, eq. 5).

    Returns int8 codes in [-8, 7].
    """
    _check("int4_absmean", x, check)
    codes, scale = _int4(x.float(), torch.float64)
    return codes.to(torch.int8), scale


def int8_absmax(x: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
    """X_q = RoundClip(127 X / gamma, -128, 127), X ~ gamma/127 X_q, gamma = max|X| (S, eq. 4)."""
    _check("int8_absmax", x, check)
    codes, scale = _int8(x.float())
    return codes.to(torch.int8), scale


def topk_int8(x: Tensor, k: int, check: bool = True) -> tuple[Tensor, Tensor]:
    """INT8 absmax of the k largest |X| of the row, zero elsewhere (S, eq. 3).

    The mask is taken before quantising; ties go to the lower index [D].
    """
    _check("topk_int8", x, check)
    codes, scale = _int8(x.float())
    return codes.to(torch.int8) * topk_mask(x, k), scale


def fp4_e2m1(x: Tensor, check: bool = True) -> tuple[Tensor, Tensor]:
    """Nearest of +-{0, .5, 1, 1.5, 2, 3, 4, 6} times max|X|/6, per token [D] (S, section 2.3).

    Codes are TWICE the grid value, int8 in +-{0, 1, 2, 3, 4, 6, 8, 12}, and scale is max|X|/12.
    A value half-way between two grid points takes the one of even mantissa.
    """
    _check("fp4_e2m1", x, check)
    codes, scale = _fp4(x.float())
    return codes.to(torch.int8), scale


def kv_absmax(x: Tensor, bits: int, check: bool = True) -> tuple[Tensor, Tensor]:
    """q = RoundClip(X / s, -m, m) + m, m = 2^(bits-1) - 1, s = fp16(max|X| / m), X ~ (q - m) s.

    One row is one head of one token, after RoPE [D]. Returns UNSIGNED uint8 codes in [0, 2m] and
    s as float32: a normal fp16 number, rounded before it divides.
    """
    _check("kv_absmax", x, check)
    qmax = kv_qmax(bits)
    codes, scale = _kv(x.float(), qmax)
    return (codes + qmax).to(torch.uint8), scale


def kv_qmax(bits: int) -> int:
    """The largest level of a KV code, also its offset: 7 for 4 bits, 3 for 3."""
    if bits not in (3, 4):
        raise ValueError(f"kv_absmax: no {bits}-bit KV cache; has [3, 4]")
    return 2 ** (bits - 1) - 1


def fake_ternary(w: Tensor) -> Tensor:
    """ternary_absmean, dequantised; the gradient passes straight through."""
    return _straight_through(w, *_ternary(w.float(), torch.float32))


def fake_int4(x: Tensor) -> Tensor:
    """int4_absmean, dequantised; the gradient passes straight through."""
    return _straight_through(x, *_int4(x.float(), torch.float32))


def fake_int8(x: Tensor) -> Tensor:
    """int8_absmax, dequantised; the gradient passes straight through."""
    return _straight_through(x, *_int8(x.float()))


def fake_topk_int8(x: Tensor, k: int) -> Tensor:
    """topk_int8, dequantised; the gradient passes straight through the TopK as well (S)."""
    mask = topk_mask(x.detach(), k)
    codes, scale = _int8(x.float())
    return _straight_through(x, codes * mask, scale)


def fake_fp4(x: Tensor) -> Tensor:
    """fp4_e2m1, dequantised; the gradient passes straight through."""
    return _straight_through(x, *_fp4(x.float()))


def fake_kv(x: Tensor, qmax: int | Tensor) -> Tensor:
    """kv_absmax, dequantised; `qmax` may be a tensor that broadcasts, to mix bit widths."""
    return _straight_through(x, *_kv(x.float(), qmax))


def _straight_through(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x + (codes * scale - x).detach()


def _mean_abs(x: Tensor, accumulate_dtype: torch.dtype) -> Tensor:
    magnitude = x.abs()
    total = magnitude.sum(dim=-1, keepdim=True, dtype=accumulate_dtype)
    return (total / x.shape[-1]).float().clamp(min=EPSILON)


def _max_abs(x: Tensor) -> Tensor:
    return x.abs().amax(dim=-1, keepdim=True)


def _ternary(w: Tensor, accumulate_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = _mean_abs(w.reshape(-1), accumulate_dtype).reshape(())
    return torch.round(w / scale).clamp(-1, 1), scale


def _int4(x: Tensor, accumulate_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    beta = _mean_abs(x, accumulate_dtype)
    sqrt7 = torch.full_like(beta, SQRT7)  # float32 operands: one float32 division each
    return torch.round(x * (sqrt7 / beta)).clamp(-8, 7), beta / sqrt7


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    gamma = _max_abs(x).clamp(min=EPSILON)
    top = torch.full_like(gamma, 127.0)
    return torch.round(x * (top / gamma)).clamp(-128, 127), gamma / top


def _fp4(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = _max_abs(x).clamp(min=EPSILON) / torch.full_like(x[..., :1], float(FP4_MAX_CODE))
    y = x / scale
    magnitude = y.abs()
    # Codes step by 1 below 4, by 2 below 8, by 4 up to 12: half to even is then even mantissa.
    step = 1.0 + (magnitude >= 4.0).float() + 2.0 * (magnitude >= 8.0).float()
    return (torch.round(y / step) * step).clamp(-FP4_MAX_CODE, FP4_MAX_CODE), scale


def _kv(x: Tensor, qmax: int | Tensor) -> tuple[Tensor, Tensor]:
    amax = _max_abs(x)
    levels = qmax if isinstance(qmax, Tensor) else torch.full_like(amax, float(qmax))
    # Above the largest fp16 the codes saturate; a subnormal scale would lose its precision.
    scale = (amax / levels).clamp(max=FP16_MAX).half().float().clamp(min=FP16_MIN_NORMAL)
    return torch.minimum(torch.maximum(torch.round(x / scale), -levels), levels), scale


def _check(name: str, x: Tensor, check: bool) -> None:
    if check and not torch.isfinite(x).all():
        raise ValueError(f"{name}: input of shape {list(x.shape)} holds NaN or infinity")
