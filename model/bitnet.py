"""The BitNet transformer for training: float latent weights, quantizers simulated in the forward.

One layer (b1.58's published layout; arXiv 2411.04965 section 2 for what feeds each linear):
    h = input_layernorm(x) -> QUANT -> q, k, v -> RoPE -> KV quant -> causal attention
      -> attn_sub_norm -> QUANT -> o_proj -> + x
    h = post_attention_layernorm(x) -> QUANT -> gate, up -> relu(gate)^2 * up
      -> ffn_sub_norm -> QUANT -> down_proj -> + x

`stage` picks the quantizers, with no change to the parameters:
    site         | 'a8'        | 'hybrid', int4   | 'hybrid', fp4
    qkv, gate/up | INT8 absmax | INT4 absmean     | FP4 E2M1
    o_proj       | INT8 absmax | TopK + INT8      | FP4 E2M1
    down_proj    | INT8 absmax | INT8 absmax      | INT8 absmax
    KV cache     | none        | config.kv_bits   | config.kv_bits
The 'llama' variant has no quantizers and no sub-norms, and silu in place of relu^2.
Parameter names and shapes are those of transformers' BitNetForCausalLM. No bias anywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.quantizers import (
    fake_fp4,
    fake_int4,
    fake_int8,
    fake_kv,
    fake_ternary,
    fake_topk_int8,
    kv_qmax,
)

STAGES = ("a8", "hybrid")
BOS_KV_BITS = 4  # of position 0 where the rest of the cache has 3
INIT_STD = 0.02


class RMSNorm(nn.Module):
    """x / rms(x) * weight in float32; keeps zeros."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class ActivationQuant(nn.Module):
    """The quantizer in front of one linear; a module so that a hook can see its output."""

    def __init__(self, config: ModelConfig, site: str) -> None:
        super().__init__()
        self.is_ternary = config.is_ternary
        self.site = site
        self.format = config.activation_format
        self.k = config.topk

    def forward(self, x: Tensor, stage: str) -> Tensor:
        if not self.is_ternary:
            return x
        if stage == "a8" or self.site == "down":
            return fake_int8(x)
        if self.format == "fp4":
            return fake_fp4(x)
        return fake_topk_int8(x, self.k) if self.site == "o" else fake_int4(x)


class BitLinear(nn.Linear):
    """A linear without bias whose weight is ternary in the forward, float for 'llama'."""

    def __init__(self, in_features: int, out_features: int, is_ternary: bool) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.is_ternary = is_ternary
        nn.init.normal_(self.weight, std=INIT_STD)

    def quantized_weight(self) -> Tensor:
        return fake_ternary(self.weight) if self.is_ternary else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantized_weight())


def fused_linear(x: Tensor, linears: list[BitLinear]) -> tuple[Tensor, ...]:
    """Several linears of one input as one matrix product; each keeps its own weight scale."""
    weight = torch.cat([linear.quantized_weight() for linear in linears])
    return F.linear(x, weight).split([linear.out_features for linear in linears], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.kv_bits = config.kv_bits
        hidden, ternary = config.hidden_size, config.is_ternary
        self.q_proj = BitLinear(hidden, config.attention_size, ternary)
        self.k_proj = BitLinear(hidden, config.kv_size, ternary)
        self.v_proj = BitLinear(hidden, config.kv_size, ternary)
        self.o_proj = BitLinear(config.attention_size, hidden, ternary)
        self.in_quant = ActivationQuant(config, "qkv")
        self.out_quant = ActivationQuant(config, "o")
        if ternary:
            self.attn_sub_norm = RMSNorm(config.attention_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, stage: str) -> Tensor:
        """x [batch, sequence, hidden]; cos and sin [sequence, head_dim]."""
        x = self.in_quant(x, stage)
        heads = fused_linear(x, [self.q_proj, self.k_proj, self.v_proj])
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in heads)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if stage == "hybrid" and self.kv_bits < 16:
            qmax = kv_levels(k.shape[2], self.kv_bits, k.device)
            k, v = fake_kv(k, qmax).to(v.dtype), fake_kv(v, qmax).to(v.dtype)
        is_grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        y = y.transpose(1, 2).flatten(2)
        if hasattr(self, "attn_sub_norm"):
            y = self.attn_sub_norm(y)
        return self.o_proj(self.out_quant(y, stage))


class GatedUnit(nn.Module):
    """relu(gate)^2 * up, or silu(gate) * up for 'llama'; a module so that a hook can see it."""

    def __init__(self, is_ternary: bool) -> None:
        super().__init__()
        self.is_ternary = is_ternary

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return (F.relu(gate).square() if self.is_ternary else F.silu(gate)) * up


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, ternary = config.hidden_size, config.intermediate_size, config.is_ternary
        self.gate_proj = BitLinear(hidden, inner, ternary)
        self.up_proj = BitLinear(hidden, inner, ternary)
        self.down_proj = BitLinear(inner, hidden, ternary)
        self.in_quant = ActivationQuant(config, "gate_up")
        self.unit = GatedUnit(ternary)
        self.out_quant = ActivationQuant(config, "down")
        if ternary:
            self.ffn_sub_norm = RMSNorm(inner, config.rms_norm_eps)

    def forward(self, x: Tensor, stage: str) -> Tensor:
        x = self.in_quant(x, stage)
        y = self.unit(*fused_linear(x, [self.gate_proj, self.up_proj]))
        if hasattr(self, "ffn_sub_norm"):
            y = self.ffn_sub_norm(y)
        return self.down_proj(self.out_quant(y, stage))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, stage: str) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, stage)
        return x + self.mlp(self.post_attention_layernorm(x), stage)


class Decoder(nn.Module):
    """Embedding, layers and last norm; tokens [batch, sequence] to float32 hidden states."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=INIT_STD)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, stage: str) -> Tensor:
        length = tokens.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, stage)
        return x


class BitNetModel(nn.Module):
    """Logits of the next token; the head stays in high precision (b1.58, v2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=INIT_STD)

    @property
    def head_weight(self) -> Tensor:
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def forward(self, tokens: Tensor, stage: str = "a8") -> Tensor:
        """tokens [batch, sequence], position 0 being bos; returns [batch, sequence, vocab]."""
        self._check(tokens, stage)
        return F.linear(self.model.norm(self.model(tokens, stage)), self.head_weight)

    def loss(self, tokens: Tensor, targets: Tensor, stage: str = "a8") -> Tensor:
        """Mean cross entropy in nats a token; targets is shaped as tokens."""
        self._check(tokens, stage)
        return self.head_loss(self.model(tokens, stage), targets)

    def head_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.model.norm(hidden), self.head_weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def compile_parts(self) -> None:
        """Compile the layer once for all layers, and the head; shapes must then stay fixed."""
        for layer in self.model.layers:
            layer.compile(fullgraph=True, dynamic=False)
        compiled = torch.compile(self.head_loss, fullgraph=True, dynamic=False)
        self.head_loss = compiled  # type: ignore[method-assign]

    def _check(self, tokens: Tensor, stage: str) -> None:
        if stage not in STAGES:
            raise ValueError(f"bitnet: stage {stage!r} is unknown; has {list(STAGES)}")
        limit = self.config.max_position_embeddings
        if tokens.shape[1] > limit:
            raise ValueError(f"bitnet: {tokens.shape[1]} tokens asked, the model has {limit}")


def rope_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [max_position_embeddings, head_dim], the two halves equal."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    position = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angle = torch.outer(position, 1.0 / config.rope_theta**exponent)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, rotate_half style; x [batch, heads, sequence, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def kv_levels(length: int, bits: int, device: torch.device) -> Tensor:
    """kv_qmax for each position [length, 1]: the bos heads keep 4 bits in a 3-bit cache."""
    first = torch.arange(length, device=device)[:, None] == 0
    return torch.where(first, float(kv_qmax(max(bits, BOS_KV_BITS))), float(kv_qmax(bits)))
