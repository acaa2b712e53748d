"""Ternary weights at two bits, and the files a trained model is written as.

Layout of a packed weight (transformers' BitNet): R = ceil(out / 4) and
    packed[r, c] = sum over i = 0..3 of (w[i R + r, c] + 1) << 2 i,   rows past `out` left 0:
slabs along the output dimension, not neighbours. `weight_scale` is float32 [1] = mean|W| and
MULTIPLIES (transformers' `autobitlinear`, offline; its `bitlinear` stores the inverse).
The embedding of a packed file is an INT8 table with one float32 scale a row, absmax / 127.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.config import ModelConfig
from model.quantizers import int8_absmax, ternary_absmean

WEIGHTS_NAME = "model.safetensors"
EMBEDDING_NAMES = ("model.embed_tokens.weight", "lm_head.weight")
CODES_PER_BYTE = 4


def pack_ternary(codes: Tensor) -> Tensor:
    """int8 [out, in] of -1, 0, 1 to uint8 [ceil(out / 4), in]."""
    if codes.dim() != 2 or codes.dtype != torch.int8 or codes.abs().max() > 1:
        raise ValueError(f"pack_ternary: want int8 [out, in] of -1, 0, 1, found {codes.dtype}")
    rows = -(-codes.shape[0] // CODES_PER_BYTE)
    packed = torch.zeros(rows, codes.shape[1], dtype=torch.uint8, device=codes.device)
    for i, slab in enumerate(codes.split(rows)):
        packed[: len(slab)] |= (slab + 1).to(torch.uint8) << (2 * i)
    return packed


def unpack_ternary(packed: Tensor, out_features: int) -> Tensor:
    """The inverse of pack_ternary."""
    rows = packed.shape[0]
    if packed.dtype != torch.uint8 or rows != -(-out_features // CODES_PER_BYTE):
        raise ValueError(
            f"unpack_ternary: {packed.dtype} of {rows} rows cannot hold {out_features} outputs"
        )
    slabs = [((packed >> (2 * i)) & 3).to(torch.int8) - 1 for i in range(CODES_PER_BYTE)]
    codes = torch.cat(slabs)[:out_features]
    if codes.numel() and codes.max() > 1:
        raise ValueError("unpack_ternary: found code 3; possible are 0, 1, 2")
    return codes


def packed_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of latent weights as the tensors of a packed file."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in EMBEDDING_NAMES:
            codes, scale = int8_absmax(value)
            tensors[name], tensors[f"{name}_scale"] = codes, scale.squeeze(-1)
        elif value.dim() == 2:
            codes, scale = ternary_absmean(value)
            tensors[name], tensors[f"{name}_scale"] = pack_ternary(codes), scale.reshape(1)
        else:
            tensors[name] = value.float()
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def write_packed(state: Mapping[str, Tensor], config: ModelConfig, directory: Path) -> int:
    """Write model.safetensors and config.json; returns the bytes of the weights."""
    if not config.is_ternary:
        raise ValueError(f"write_packed: variant {config.variant!r} has no ternary weights")
    return _write(packed_tensors(state), config, directory, "offline")


def write_latent(
    state: Mapping[str, Tensor], config: ModelConfig, directory: Path, dtype: torch.dtype
) -> int:
    """Write the latent weights, to be quantised on the fly; returns their bytes."""
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    return _write(tensors, config, directory, "online" if config.is_ternary else None)


def _write(
    tensors: dict[str, Tensor], config: ModelConfig, directory: Path, mode: str | None
) -> int:
    from safetensors.torch import save_file

    config.save(directory, mode)
    path = directory / WEIGHTS_NAME
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors creates it for its owner alone
    return path.stat().st_size
