"""The shipped model: small, whole, and as good on held-out English as its README says."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model import checkpoint
from model.bitnet import BitNetModel
from model.integer import IntegerModel, Prefill

TEXT = Path(__file__).parents[1] / "data" / "valid_excerpt.txt"  # of an author not trained on
SHIPPED = checkpoint.find("novels-42m")
WINDOW = 1000  # of two


@pytest.fixture(scope="module")
def model() -> IntegerModel:
    return checkpoint.load_integer_model(SHIPPED)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    """The text's first tokens in two windows, [2, WINDOW + 1], bos first as in training."""
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    bos, *ids = tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids
    assert bos == 0 and len(ids) >= 2 * WINDOW
    return torch.tensor([[bos, *ids[start : start + WINDOW]] for start in (0, WINDOW)])


def token_losses(model: IntegerModel, window: torch.Tensor, kv_bits: int) -> torch.Tensor:
    """Nats of each token, f32[WINDOW]."""
    rows, caches = torch.arange(WINDOW), model.empty_caches(kv_bits, 1, WINDOW)
    step = Prefill(model, kv_bits)
    logits, _ = step(window[:-1], torch.zeros_like(rows), rows, rows, caches)
    return F.cross_entropy(logits, window[1:], reduction="none")


def test_it_is_at_most_16_mib():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 16 * 2**20


def test_its_files_are_there_and_fit_each_other(model):
    names = {path.name for path in SHIPPED.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= names
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == model.config.vocab_size
    special = [tokenizer.token_to_id(token) for token in ("<bos>", "<eos>")]
    assert special == [model.config.bos_token_id, model.config.eos_token_id]
    assert json.loads((SHIPPED / "config.json").read_text())["max_position_embeddings"] == 1024


def test_its_loss_on_held_out_text(model, windows):
    """One test, so that parallel workers compute the first line once.

    3.46 on the whole validation text, and 3.44 on a window of each of its ten books, which go from
    3.0 to 3.8; this text is a hard one (3.98 and 3.50). An untrained model has log(8192) = 9.0.
    """
    losses = torch.stack([token_losses(model, window, 3) for window in windows])
    assert 3.0 < losses.mean() < 3.9
    check_three_bit_cache_costs_little(losses[1], token_losses(model, windows[1], 16))
    check_serving_costs_nothing(losses[1], training_losses(model, windows[1]))


def check_three_bit_cache_costs_little(losses: torch.Tensor, losses_16: torch.Tensor) -> None:
    """The paper: nothing beyond noise. The noise here is that of the paired difference."""
    difference = losses - losses_16
    noise = difference.std() / WINDOW**0.5
    assert noise < 0.02 and difference.mean() < 0.02 + 3 * noise
    assert difference.abs().mean() > 1e-3  # 16 bits are not 3


def check_serving_costs_nothing(losses: torch.Tensor, trained: torch.Tensor) -> None:
    """Against the training forward: float attention instead of INT8 queries and byte probabilities,
    float head inputs. Twelve layers of INT4 amplify that to other codes in most places (0.4 nats a
    token, either way), so only the mean can agree: within its noise."""
    difference = losses - trained
    noise = difference.std() / WINDOW**0.5
    assert noise < 0.02 and difference.mean() < 3 * noise


def training_losses(model: IntegerModel, window: torch.Tensor) -> torch.Tensor:
    """Nats of each token by the training forward on the packed weights, f32[WINDOW]."""
    training = BitNetModel(model.config).eval()
    weights = dict(model.named_buffers())
    with torch.no_grad():
        table = weights["embed.table"] * weights["embed.scale"][:, None]
        training.model.embed_tokens.weight.copy_(table)
        training.model.norm.weight.copy_(weights["norm"])
        for i, layer in enumerate(training.model.layers):
            copy_layer(layer, weights, f"layers.{i}.")
        logits = training(window[None, :-1], "hybrid")[0]
    return F.cross_entropy(logits, window[1:], reduction="none")


def copy_layer(layer, weights: dict[str, torch.Tensor], prefix: str) -> None:
    """Codes times scale as float weights, with the weights' quantizer taken out: it would not give
    them back, as the mean of |codes| x scale is less than the scale."""
    sources = {
        "qkv": (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
        "o": (layer.self_attn.o_proj,), "gate": (layer.mlp.gate_proj,),
        "up": (layer.mlp.up_proj,), "down": (layer.mlp.down_proj,),
    }  # fmt: skip
    for name, linears in sources.items():
        product = weights[f"{prefix}{name}.w"] * weights[f"{prefix}{name}.scale"][:, None]
        parts = product.split([linear.out_features for linear in linears])
        for linear, part in zip(linears, parts, strict=True):
            linear.weight.copy_(part)
            linear.is_ternary = False
    norms = {
        "attn_norm": layer.input_layernorm, "attn_sub_norm": layer.self_attn.attn_sub_norm,
        "ffn_norm": layer.post_attention_layernorm, "ffn_sub_norm": layer.mlp.ffn_sub_norm,
    }  # fmt: skip
    for name, norm in norms.items():
        norm.weight.copy_(weights[f"{prefix}{name}"])
