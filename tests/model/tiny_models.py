"""Tiny models with random weights, as a training model, as a file and as integers."""

from pathlib import Path

import torch
from torch import Tensor

from model import ops
from model.bitnet import BitNetModel
from model.checkpoint import load_integer_model
from model.config import MODELS, ModelConfig
from model.evaluate import with_int8_embedding
from model.integer import IntegerModel
from model.packing import write_latent, write_packed

TINY = MODELS["tiny"]
VARIANTS = {
    "a4.8-int4": TINY,
    "a4.8-fp4": TINY.replace(activation_format="fp4"),
    "b1.58": TINY.with_variant("b1.58"),
    "llama": TINY.with_variant("llama"),
}


def training_model(config: ModelConfig, seed: int = 0) -> BitNetModel:
    """Embeddings of size one and outputs of about one, so that every layer counts; uneven gains.

    The weights are what a file keeps of them: an INT8 embedding, or float16 for llama.
    """
    torch.manual_seed(seed)
    model = BitNetModel(config).eval()
    state = dict(model.state_dict())
    for name, value in state.items():
        if value.dim() == 1:
            state[name] = 1 + 0.3 * torch.randn_like(value)
        elif "proj" in name:
            state[name] = torch.randn_like(value) * value.shape[1] ** -0.5
        else:
            state[name] = torch.randn_like(value)
    if config.is_ternary:
        state = with_int8_embedding(state)
    else:
        state = {name: value.half().float() for name, value in state.items()}
    model.load_state_dict(state)
    return model


def save(model: BitNetModel, directory: Path) -> Path:
    """As the trainer writes it: packed, or float for llama."""
    if model.config.is_ternary:
        write_packed(model.state_dict(), model.config, directory)
    else:
        write_latent(model.state_dict(), model.config, directory, torch.float32)
    return directory


def integer_model(model: BitNetModel, directory: Path) -> IntegerModel:
    return load_integer_model(save(model, directory))


def random_tokens(config: ModelConfig, sequences: int, length: int, seed: int = 0) -> Tensor:
    """i64 [sequences, length], bos first."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, config.vocab_size, (sequences, length), generator=generator)
    tokens[:, 0] = config.bos_token_id
    return tokens


def rows_of(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, slots and positions i64[M] of whole sequences, one slot each."""
    sequences, length = tokens.shape
    slots = torch.arange(sequences).repeat_interleave(length)
    return tokens.reshape(-1), slots, torch.arange(length).repeat(sequences)


def integer_hidden(model: IntegerModel, tokens: Tensor, kv_bits: int) -> Tensor:
    """The last norm's output, f32 [sequences, length, hidden], all sequences in one step."""
    caches = model.empty_caches(kv_bits, *tokens.shape)
    x, _ = model.trunk(*rows_of(tokens), caches, kv_bits)
    return ops.rms_norm(x, model.norm, model.config.rms_norm_eps).reshape(*tokens.shape, -1)


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """|found - expected| / |expected| of each position, the norms being over the features."""
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)
