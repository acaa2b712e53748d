"""The integer forward: what is exported, compiled and served, written with the ops of `bitnet::*`.

`Prefill` and `Decode` wrap one `IntegerModel`; its buffers are the parameters of the compiled
functions and their names are the artifact's (docs/architecture.md, "The compiled module").
Shapes: M token rows, each with a slot and a position.
"""

import torch
from torch import Tensor, nn

from model import grouped, kv_cache, ops
from model.config import ModelConfig


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos, sin f32[P, D/2] of position * theta^(-2i/D), computed in float64 (arXiv 2104.09864)."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(config.max_position_embeddings, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of a layer's linear weights, q, k and v being one matrix."""
    hidden, glu = config.hidden_size, config.intermediate_size
    return {
        "qkv": (config.attention_size + 2 * config.kv_size, hidden),
        "o": (hidden, config.attention_size),
        "gate": (glu, hidden),
        "up": (glu, hidden),
        "down": (hidden, glu),
    }


class _Leaf(nn.Module):
    """A named group of buffers, so that the parameter names read `qkv.w`, `embed.table`."""

    table: Tensor

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)


def _linear(config: ModelConfig, name: str) -> _Leaf:
    n, k = linear_shapes(config)[name]
    if not config.is_ternary:
        return _Leaf(w=torch.zeros(n, k, dtype=torch.float16))
    return _Leaf(w=torch.zeros(n, k, dtype=torch.int8), scale=torch.zeros(n))


def table_bits(config: ModelConfig) -> dict[str, int]:
    """Bits of the tables of a ternary variant; a tied one is the head, so it has the head's."""
    if config.tie_word_embeddings:
        return {"embed": config.head_bits}
    return {"embed": 8, "head": config.head_bits}


def _table(config: ModelConfig, name: str) -> _Leaf:
    vocab, hidden = config.vocab_size, config.hidden_size
    if not config.is_ternary:
        return _Leaf(table=torch.zeros(vocab, hidden, dtype=torch.float16))
    bits = table_bits(config)[name]
    if bits in grouped.BITS:
        table = torch.zeros(vocab, grouped.row_bytes(hidden, bits), dtype=torch.uint8)
    else:
        table = torch.zeros(vocab, hidden, dtype=torch.int8)
    return _Leaf(table=table, scale=torch.zeros(vocab))


class IntegerLayer(nn.Module):
    """One transformer layer of a ternary variant (a4.8 section 2.1, b1.58's sub-norms)."""

    attn_norm: Tensor
    attn_sub_norm: Tensor
    ffn_norm: Tensor
    ffn_sub_norm: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("attn_norm", torch.ones(config.hidden_size))
        self.qkv = _linear(config, "qkv")
        self.register_buffer("attn_sub_norm", torch.ones(config.attention_size))
        self.o = _linear(config, "o")
        self.register_buffer("ffn_norm", torch.ones(config.hidden_size))
        self.gate = _linear(config, "gate")
        self.up = _linear(config, "up")
        self.register_buffer("ffn_sub_norm", torch.ones(config.intermediate_size))
        self.down = _linear(config, "down")

    def _quantize(self, x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, int]:
        """Norm and quantise the input of qkv, gate and up: (q, scale, act_bits)."""
        eps = self.config.rms_norm_eps
        if self.config.variant == "b1.58":
            return *ops.rms_norm_int8(x, gain, eps), 8
        if self.config.activation_format == "fp4":
            return *ops.rms_norm_fp4(x, gain, eps), 8
        return *ops.rms_norm_int4(x, gain, eps), 4

    def _project(self, x: Tensor, gain: Tensor, linear: _Leaf, k: int, residual: Tensor) -> Tensor:
        q, scale, index, count = ops.rms_norm_topk_int8(x, gain, self.config.rms_norm_eps, k)
        return ops.sparse_ternary_matmul(q, scale, index, count, linear.w, linear.scale, residual)

    def attend(self, qkv: Tensor, rope, cache, slots: Tensor, positions: Tensor, kv_bits: int):
        """(attention output f32[M, Hq*D], the layer's updated cache)."""
        heads = (self.config.num_attention_heads, self.config.num_key_value_heads)
        qkv = ops.rope(qkv, rope.cos, rope.sin, positions, *heads)
        cache = kv_cache.kv_append(*cache, qkv, slots, positions, *heads, kv_bits)
        return kv_cache.attention(qkv, *cache, slots, positions, *heads, kv_bits), cache

    def forward(self, x: Tensor, rope, cache, slots: Tensor, positions: Tensor, kv_bits: int):
        config = self.config
        q, scale, bits = self._quantize(x, self.attn_norm)
        qkv = ops.ternary_matmul(q, scale, self.qkv.w, self.qkv.scale, bits)
        y, cache = self.attend(qkv, rope, cache, slots, positions, kv_bits)
        if config.variant == "a4.8" and config.activation_format == "fp4":
            q, scale = ops.rms_norm_fp4(y, self.attn_sub_norm, config.rms_norm_eps)
            x = x + ops.ternary_matmul(q, scale, self.o.w, self.o.scale, 8)
        else:
            k = config.topk if config.variant == "a4.8" else config.attention_size
            x = self._project(y, self.attn_sub_norm, self.o, k, x)
        q, scale, bits = self._quantize(x, self.ffn_norm)
        gate = ops.ternary_matmul(q, scale, self.gate.w, self.gate.scale, bits)
        glu = ops.ternary_glu_matmul(q, scale, self.up.w, self.up.scale, gate, bits)
        return self._project(glu, self.ffn_sub_norm, self.down, config.intermediate_size, x), cache


class FloatLayer(IntegerLayer):
    """One layer of the float `llama` baseline: float16 weights, no SubLN, SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        del self.attn_sub_norm, self.ffn_sub_norm

    def forward(self, x: Tensor, rope, cache, slots: Tensor, positions: Tensor, kv_bits: int):
        eps = self.config.rms_norm_eps
        qkv = ops.float_matmul(ops.rms_norm(x, self.attn_norm, eps), self.qkv.w)
        y, cache = self.attend(qkv, rope, cache, slots, positions, kv_bits)
        x = x + ops.float_matmul(y, self.o.w)
        h = ops.rms_norm(x, self.ffn_norm, eps)
        gate = ops.float_matmul(h, self.gate.w)
        glu = nn.functional.silu(gate) * ops.float_matmul(h, self.up.w)
        return x + ops.float_matmul(glu, self.down.w), cache


class IntegerModel(nn.Module):
    """Embedding, layers and head over M token rows; weights are buffers, caches are arguments."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = _table(config, "embed")
        if not config.tie_word_embeddings:
            self.head = _table(config, "head")
        cos, sin = rope_tables(config)
        self.rope = _Leaf(cos=cos, sin=sin)
        layer = IntegerLayer if config.is_ternary else FloatLayer
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.register_buffer("norm", torch.ones(config.hidden_size))

    def trunk(self, tokens: Tensor, slots: Tensor, positions: Tensor, caches: list, kv_bits: int):
        """tokens, slots, positions i64[M]; caches [codes0, scales0, codes1, ...]
        -> (f32[M, hidden], caches).
        """
        x = self._embed(tokens)
        updated: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            cache = (caches[2 * i], caches[2 * i + 1])
            x, cache = layer(x, self.rope, cache, slots, positions, kv_bits)
            updated.extend(cache)
        return x, updated

    def _embed(self, tokens: Tensor) -> Tensor:
        config, table = self.config, self.embed.table
        if not config.is_ternary:
            return table[tokens].float()
        bits = table_bits(config)["embed"]
        if bits in grouped.BITS:
            return ops.grouped_embedding(tokens, table, self.embed.scale, config.hidden_size, bits)
        return ops.embedding(tokens, table, self.embed.scale)

    def logits(self, x: Tensor) -> Tensor:
        """Final norm and head: f32[R, hidden] -> f32[R, vocabulary]."""
        head = self.embed if self.config.tie_word_embeddings else self.head
        eps = self.config.rms_norm_eps
        if not self.config.is_ternary:
            return ops.float_matmul(ops.rms_norm(x, self.norm, eps), head.table)
        q, scale = ops.rms_norm_int8(x, self.norm, eps)
        if (bits := self.config.head_bits) in grouped.BITS:
            return ops.grouped_matmul(q, scale, head.table, head.scale, bits)
        return ops.int8_matmul(q, scale, head.table, head.scale)

    def empty_caches(self, kv_bits: int, slots: int, context: int) -> list[Tensor]:
        """Zeroed caches of every layer, as `trunk` takes them."""
        config = self.config
        shape = (slots, context, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        return [tensor for _ in layers for tensor in kv_cache.empty_cache(kv_bits, *shape)]


class Prefill(nn.Module):
    """Many rows of a prompt in, the logits of the chosen `rows` i64[R] out."""

    def __init__(self, model: IntegerModel, kv_bits: int) -> None:
        super().__init__()
        self.model, self.kv_bits = model, kv_bits

    def forward(self, tokens: Tensor, slots: Tensor, positions: Tensor, rows: Tensor, caches: list):
        """-> (logits f32[R, vocabulary], updated caches)."""
        x, caches = self.model.trunk(tokens, slots, positions, caches, self.kv_bits)
        return self.model.logits(x[rows]), caches


class Decode(nn.Module):
    """One row a sequence in, the logits of every row out."""

    def __init__(self, model: IntegerModel, kv_bits: int) -> None:
        super().__init__()
        self.model, self.kv_bits = model, kv_bits

    def forward(self, tokens: Tensor, slots: Tensor, positions: Tensor, caches: list):
        """-> (logits f32[M, vocabulary], updated caches)."""
        x, caches = self.model.trunk(tokens, slots, positions, caches, self.kv_bits)
        return self.model.logits(x), caches
