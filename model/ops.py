"""The torch custom ops `bitnet::*`: the eager integer reference, and so the definition of correct.

Every op maps one to one onto `R.bitnet.<op>` of the compiler. The float orders that make the
integers equal bit for bit on every target are written down in docs/architecture.md, "The dialect";
the KV cache ops live in `model/kv_cache.py`.

M token rows; K reduced, N produced features. Quantised activations are int8 with one float32 scale
a row.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from model import grouped, quantizers

# One matmul of float32 is exact while every partial sum stays below 2**24: for int8 x ternary,
# K < 2**17.
MAX_EXACT_FLOAT32 = 2**24


def exact_matmul(q: Tensor, w: Tensor) -> Tensor:
    """Integer product of q i8[M, K] and w i8[N, K] as float32[M, N] holding exact int32 values.

    Float multiplication is how a CPU without integer BLAS gets an exact answer quickly. int8 x
    int8 can pass 2**24, hence float64 there; the int32 result is rounded to float32 once, as the
    kernels do.
    """
    wide = (
        w.dtype == torch.int8 and q.shape[1] * 127 * 127 >= MAX_EXACT_FLOAT32 and w.abs().max() > 1
    )
    dtype = torch.float64 if wide else torch.float32
    return (q.to(dtype) @ w.to(dtype).T).float()


def _normalize(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    mean_square = x.double().square().sum(-1, keepdim=True) / x.shape[-1]
    rstd = (1.0 / torch.sqrt(mean_square + eps)).float()
    return (x * rstd) * gain


def _scaled(acc: Tensor, scale: Tensor, w_scale: Tensor) -> Tensor:
    return acc * (scale[:, None] * w_scale[None, :])


@custom_op("bitnet::embedding", mutates_args=())
def embedding(tokens: Tensor, table: Tensor, table_scale: Tensor) -> Tensor:
    """Rows of an INT8 table: tokens i64[M], table i8[V, K], table_scale f32[V] -> f32[M, K]."""
    return table[tokens].float() * table_scale[tokens][:, None]


@embedding.register_fake
def _(tokens: Tensor, table: Tensor, table_scale: Tensor) -> Tensor:
    return table_scale.new_empty((tokens.shape[0], table.shape[1]))


@custom_op("bitnet::grouped_embedding", mutates_args=())
def grouped_embedding(
    tokens: Tensor, table: Tensor, table_scale: Tensor, k: int, bits: int
) -> Tensor:
    """Rows of a packed table of `model.grouped`: tokens i64[M], table u8[V, B], table_scale f32[V]
    -> f32[M, k].

    code * group is exact in float32; it is multiplied by the row's scale once.
    """
    return grouped.levels(table[tokens], k, bits).float() * table_scale[tokens][:, None]


@grouped_embedding.register_fake
def _(tokens: Tensor, table: Tensor, table_scale: Tensor, k: int, bits: int) -> Tensor:
    return table_scale.new_empty((tokens.shape[0], k))


@custom_op("bitnet::rms_norm", mutates_args=())
def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """h = x / sqrt(mean(x^2) + eps) * gain, per row: x f32[M, K], gain f32[K] -> f32[M, K]."""
    return _normalize(x, gain, eps)


@rms_norm.register_fake
def _(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


def _fake_quantized(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty((x.shape[0],))


@custom_op("bitnet::rms_norm_int4", mutates_args=())
def rms_norm_int4(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm, then INT4 absmean (arXiv 2411.04965): -> q i8[M, K] in [-8, 7], scale f32[M]."""
    q, scale = quantizers.int4_absmean(_normalize(x, gain, eps))
    return q, scale.reshape(-1)


@custom_op("bitnet::rms_norm_int8", mutates_args=())
def rms_norm_int8(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm, then INT8 absmax (b1.58): -> q i8[M, K], scale f32[M]."""
    q, scale = quantizers.int8_absmax(_normalize(x, gain, eps))
    return q, scale.reshape(-1)


@custom_op("bitnet::rms_norm_fp4", mutates_args=())
def rms_norm_fp4(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm, then FP4 E2M1 (a4.8 section 2.3): -> q i8[M, K], twice the grid, scale f32[M]."""
    q, scale = quantizers.fp4_e2m1(_normalize(x, gain, eps))
    return q, scale.reshape(-1)


for op in (rms_norm_int4, rms_norm_int8, rms_norm_fp4):
    op.register_fake(_fake_quantized)


@custom_op("bitnet::rms_norm_topk_int8", mutates_args=())
def rms_norm_topk_int8(
    x: Tensor, gain: Tensor, eps: float, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm, TopK mask, INT8 absmax, compressed (a4.8 equation 4): a sparse matmul's input.

    -> q i8[M, K], scale f32[M], index i32[M, K], count i32[M]: index[m, :count[m]] are the columns
    of non-zero q in rising order; the rest of index is unspecified (zero here). k = K keeps every
    column.
    """
    h = _normalize(x, gain, eps)
    q, scale = quantizers.int8_absmax(h)
    if k < h.shape[1]:
        q = q * quantizers.topk_mask(h, k).to(q.dtype)
    nonzero = q != 0
    count = nonzero.sum(-1).int()
    order = torch.sort((~nonzero).to(torch.uint8), dim=-1, stable=True).indices.int()
    listed = torch.arange(h.shape[1])[None, :] < count[:, None]
    return q, scale.reshape(-1), order * listed, count


@rms_norm_topk_int8.register_fake
def _(x: Tensor, gain: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, scale = _fake_quantized(x, gain, eps)
    return (
        q,
        scale,
        torch.empty_like(x, dtype=torch.int32),
        scale.new_empty(scale.shape, dtype=torch.int32),
    )


@custom_op("bitnet::ternary_matmul", mutates_args=())
def ternary_matmul(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, act_bits: int) -> Tensor:
    """y[m, n] = (sum_k q[m, k] w[n, k]) * (scale[m] * w_scale[n]); w i8[N, K] in {-1, 0, 1} ->
    f32[M, N].

    act_bits promises the range of q: 4 means [-8, 7], 8 means any int8.
    """
    return _scaled(exact_matmul(q, w), scale, w_scale)


@ternary_matmul.register_fake
def _(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, act_bits: int) -> Tensor:
    return scale.new_empty((q.shape[0], w_scale.shape[0]))


@custom_op("bitnet::ternary_glu_matmul", mutates_args=())
def ternary_glu_matmul(
    q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, act_bits: int
) -> Tensor:
    """Gate-first squared-ReLU GLU: y = ReLU(gate)^2 * ternary_matmul(q, w); gate f32[M, N] ->
    f32[M, N].

    Rows n of w are needed only where gate[m, n] > 0 (a4.8 section 2.2), which kernels may use.
    """
    g = gate.clamp_min(0.0)
    return (g * g) * _scaled(exact_matmul(q, w), scale, w_scale)


@ternary_glu_matmul.register_fake
def _(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, gate: Tensor, act_bits: int) -> Tensor:
    return torch.empty_like(gate)


@custom_op("bitnet::sparse_ternary_matmul", mutates_args=())
def sparse_ternary_matmul(
    q: Tensor,
    scale: Tensor,
    index: Tensor,
    count: Tensor,
    w: Tensor,
    w_scale: Tensor,
    residual: Tensor,
) -> Tensor:
    """y = residual + ternary_matmul(q, w) with q i8[M, K] sparse; index, count as
    rms_norm_topk_int8 gives them.
    """
    acc = exact_matmul(q, w).double()
    return (residual.double() + acc * (scale[:, None] * w_scale[None, :]).double()).float()


@sparse_ternary_matmul.register_fake
def _(
    q: Tensor,
    scale: Tensor,
    index: Tensor,
    count: Tensor,
    w: Tensor,
    w_scale: Tensor,
    residual: Tensor,
) -> Tensor:
    return torch.empty_like(residual)


@custom_op("bitnet::int8_matmul", mutates_args=())
def int8_matmul(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """The head: y[m, n] = (sum_k q[m, k] w[n, k]) * (scale[m] * w_scale[n]); w i8[N, K] -> f32[M,
    N].
    """
    return _scaled(exact_matmul(q, w), scale, w_scale)


@int8_matmul.register_fake
def _(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    return scale.new_empty((q.shape[0], w.shape[0]))


@custom_op("bitnet::grouped_matmul", mutates_args=())
def grouped_matmul(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, bits: int) -> Tensor:
    """A head of 6 or 4 bits: y[m, n] = (sum_k q[m, k] code[n, k] group[n, k // 64]) * (scale[m] *
    w_scale[n]); w u8[N, B] packed by `model.grouped` -> f32[M, N].
    """
    wide = q.double()
    slices = [
        wide @ grouped.levels(rows, q.shape[1], bits).double().T for rows in w.split(grouped.ROWS)
    ]
    return _scaled(torch.cat(slices, dim=1).float(), scale, w_scale)


@grouped_matmul.register_fake
def _(q: Tensor, scale: Tensor, w: Tensor, w_scale: Tensor, bits: int) -> Tensor:
    return scale.new_empty((q.shape[0], w.shape[0]))


@custom_op("bitnet::float_matmul", mutates_args=())
def float_matmul(x: Tensor, w: Tensor) -> Tensor:
    """The float baseline's linear layer: x f32[M, K], w f16[N, K] -> f32[M, N], float32 sums in
    any order.
    """
    return x @ w.float().T


@float_matmul.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]))


@custom_op("bitnet::rope", mutates_args=())
def rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, num_heads: int, num_kv_heads: int
) -> Tensor:
    """Rotary embedding (arXiv 2104.09864, rotate_half) of the q and k heads of qkv f32[M,
    (Hq+2Hkv)D]; v is copied.

    cos, sin f32[P, D/2]; row m turns by positions[m] < P. Products and sums are float64, then
    rounded once.
    """
    half = cos.shape[1]
    heads = qkv.reshape(qkv.shape[0], num_heads + 2 * num_kv_heads, 2, half).double()
    turned = num_heads + num_kv_heads
    c, s = (table[positions].double()[:, None, :] for table in (cos, sin))
    x1, x2 = heads[:, :turned, 0], heads[:, :turned, 1]
    rotated = torch.stack((x1 * c - x2 * s, x2 * c + x1 * s), dim=2)
    return torch.cat((rotated, heads[:, turned:]), dim=1).float().reshape(qkv.shape)


@rope.register_fake
def _(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, num_heads: int, num_kv_heads: int
) -> Tensor:
    return torch.empty_like(qkv)
