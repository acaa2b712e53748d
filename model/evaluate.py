"""What a model is worth: validation loss, sparsity by layer, a sample, its training curve.

Every function takes the model as it is; those that use hooks or grow the sequence want one that
is not compiled.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from model.bitnet import BitNetModel, Layer
from model.config import ModelConfig
from model.data import Windows
from model.quantizers import int8_absmax

CURVE_FIELDS = ("step", "tokens", "stage", "lr", "train", "valid_a8", "valid_hybrid", "seconds")
SITES = ("qkv", "out", "up", "gate", "down")  # the columns of the paper's sparsity table


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on CUDA, nothing elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def validation_loss(
    model: BitNetModel, windows: Windows, batch: int, stage: str, limit: int | None = None
) -> float:
    """Mean cross entropy in nats a token over `limit` tokens, or all whole batches."""
    total, count = torch.zeros((), device=windows.tokens.device), 0
    with autocast(windows.tokens.device):
        for tokens, targets in windows.sequential(batch, limit):
            total += model.loss(tokens, targets, stage)
            count += 1
    return float(total) / count


@torch.no_grad()
def sparsity(model: BitNetModel, windows: Windows, batch: int, limit: int) -> dict:
    """Shares of zeros in the hybrid stage at each linear's input: by layer, mean and overall.

    up = 1 - (1 - s_in)(1 - s_gate), s_in the zeros of the FFN input, s_gate of relu(gate):
    what can be skipped when up is computed only where the gate is non-zero. `overall` weighs
    the sites by their weights, as the paper does.
    """
    seen: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def watch(layer: int, site: str):
        return lambda _, inputs, output: seen[layer, site].append((output == 0).float().mean())

    def watch_gate(layer: int):
        return lambda _, inputs, output: seen[layer, "relu"].append((inputs[0] <= 0).float().mean())

    hooks = []
    for i, layer in enumerate(cast(Iterable[Layer], model.model.layers)):
        hooks += [
            layer.self_attn.in_quant.register_forward_hook(watch(i, "qkv")),
            layer.self_attn.out_quant.register_forward_hook(watch(i, "out")),
            layer.mlp.in_quant.register_forward_hook(watch(i, "gate")),
            layer.mlp.unit.register_forward_hook(watch_gate(i)),
            layer.mlp.out_quant.register_forward_hook(watch(i, "down")),
        ]
    validation_loss(model, windows, batch, "hybrid", limit)
    for hook in hooks:
        hook.remove()
    layers = []
    for i in range(len(model.model.layers)):
        found = {
            site: torch.stack(seen[i, site]).mean().item()
            for site in (*SITES, "relu")
            if site != "up"
        }
        found["up"] = 1 - (1 - found["gate"]) * (1 - found["relu"])
        layers.append({site: round(found[site], 4) for site in (*SITES, "relu")})
    mean = {site: sum(row[site] for row in layers) / len(layers) for site in (*SITES, "relu")}
    return {
        "by_layer": layers,
        "mean": {site: round(value, 4) for site, value in mean.items()},
        "overall": round(_overall(mean, model.config), 4),
    }


def _overall(mean: dict[str, float], config: ModelConfig) -> float:
    glu = config.hidden_size * config.intermediate_size
    weights = {
        "qkv": config.hidden_size * (config.attention_size + 2 * config.kv_size),
        "out": config.hidden_size * config.attention_size,
        "up": glu,
        "gate": glu,
        "down": glu,
    }
    return sum(mean[site] * count for site, count in weights.items()) / sum(weights.values())


def with_int8_embedding(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with the embedding as the packed file stores it."""
    name = "model.embed_tokens.weight"
    codes, scale = int8_absmax(state[name])
    return state | {name: codes * scale}


@torch.no_grad()
def sample_text(
    model: BitNetModel, tokenizer, prompt: str, stage: str, length: int, seed: int = 0
) -> str:
    """`prompt` and up to `length` sampled tokens: temperature 0.8, the 40 likeliest."""
    device = model.head_weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    tokens = tokenizer.encode(prompt).ids  # begins with <bos>
    for _ in range(min(length, model.config.max_position_embeddings - len(tokens))):
        with autocast(device):
            logits = model(torch.tensor([tokens], device=device), stage)[0, -1].float()
        values, indices = logits.topk(min(40, len(logits)))
        chance = torch.softmax(values / 0.8, dim=0)
        tokens.append(int(indices[torch.multinomial(chance, 1, generator=generator)]))
        if tokens[-1] == model.config.eos_token_id:
            break
    return tokenizer.decode(tokens)


def write_curve(curve: list[dict], directory: Path) -> None:
    """curve.csv, and curve.png where matplotlib is installed."""
    with (directory / "curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CURVE_FIELDS, restval="")
        writer.writeheader()
        writer.writerows(curve)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for field in ("train", "valid_a8", "valid_hybrid"):
        points = [(row["tokens"] / 1e6, row[field]) for row in curve if field in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=field)
    first_hybrid = [row["tokens"] / 1e6 for row in curve if row["stage"] == "hybrid"]
    if first_hybrid:
        axes.axvline(first_hybrid[0], color="grey", linestyle=":", label="hybrid stage")
    axes.set(xlabel="tokens, millions", ylabel="loss, nats a token")
    axes.legend()
    figure.savefig(directory / "curve.png", dpi=120)
