"""Read a checkpoint directory into the parameters of `model.integer`, one tensor at a time.

Read are `config.json` and `model.safetensors` (or its shards) in the Hugging Face layout: packed
ternary weights (`offline`: U8 [ceil(out/4), in], as transformers' integrations/bitnet.py), float
master weights (`online`, quantised here), float weights of the llama baseline; embeddings as
floats or as INT8 rows with scales. Nothing is unpickled.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import grouped, packing, quantizers
from model.config import ConfigError, ModelConfig
from model.integer import IntegerModel, linear_shapes, rope_tables, table_bits

ZOO = Path(__file__).parent / "zoo"  # the models that ship
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# Parameter of model.integer -> tensors of the checkpoint (several are stacked along the outputs).
_LINEARS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj",),
    "down": ("mlp.down_proj",),
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}

# What quantization_config may say of ternary weights; the first value is the default.
_QUANTIZATION: dict[str, tuple] = {
    "quant_method": ("bitnet",),
    "linear_class": ("bitlinear", "autobitlinear"),
    "quantization_mode": ("offline", "online"),
    "use_rms_norm": (False,),
    "modules_to_not_convert": (None, [], ["lm_head"]),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message is one line for the user."""

    def __init__(self, message: str) -> None:
        possible = "" if "possible:" in message else "; possible: a whole and current checkpoint"
        super().__init__(message + possible)


def zoo_models() -> list[str]:
    """Names of the models that ship with the repository."""
    return sorted(path.parent.name for path in ZOO.glob("*/config.json"))


def find(model: str) -> Path:
    """The checkpoint directory of a shipped model's name or of a path."""
    for path in (ZOO / model, Path(model)):
        if (path / "config.json").is_file():
            return path
    raise CheckpointError(
        f"model: asked for {model!r}; possible: {', '.join(zoo_models())}, or a directory with "
        f"config.json and {WEIGHTS_NAME}"
    )


class IntegerWeights(Mapping[str, np.ndarray]):
    """Parameters of `IntegerModel` by name, as numpy arrays made when asked for.

    Ternary weights are i8[N, K] in {-1, 0, 1}; `*.scale` f32[N] multiplies the integer product.
    One tensor is in memory at a time. Raises CheckpointError for what is missing, truncated or of
    another shape. `head_bits` replaces those of config.json.
    """

    def __init__(self, directory: Path | str, head_bits: int | None = None) -> None:
        self.directory = Path(directory)
        try:
            self.config = ModelConfig.load(self.directory)
            if head_bits is not None:
                self.config = self.config.replace(head_bits=head_bits)
            raw = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        quantization = self._check_quantization(raw.get("quantization_config") or {})
        # BitLinear stores 1/mean|W| and divides; AutoBitLinear stores mean|W| and multiplies.
        self._scale_is_inverse = quantization.get("linear_class", "bitlinear") == "bitlinear"
        self._shards = self._open_shards()
        self._grouped: dict[str, dict[str, Tensor]] = {}  # the table that was asked for last
        with torch.device("meta"):
            self._shapes = {
                name: tuple(buffer.shape)
                for name, buffer in IntegerModel(self.config).named_buffers()
            }

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._shapes:
            raise KeyError(name)
        try:
            tensor = self._make(name)
        except CheckpointError:
            raise
        except (ValueError, RuntimeError, SafetensorError) as error:
            line = str(error).partition("\n")[0]
            raise CheckpointError(f"{self.directory}: {name}: {line}") from error
        if tuple(tensor.shape) != self._shapes[name]:
            raise CheckpointError(
                f"{self.directory}: {name} is {tuple(tensor.shape)}, "
                f"config.json asks for {self._shapes[name]}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.directory}: {name} holds NaN or infinity")
        return tensor.contiguous().numpy()

    def _check_quantization(self, found: Any) -> dict:
        """config.json's quantization_config, refused where it asks for what we do not compute."""
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.directory}: quantization_config must be an object")
        possible = dict(_QUANTIZATION)
        if not self.config.is_ternary:
            possible["quant_method"] = (None,)  # a llama of ternary weights has no sub-norms
        for key, values in possible.items():
            if found.get(key, values[0]) not in values:
                raise CheckpointError(
                    f"{self.directory}: quantization_config: {key} {found[key]!r} is unknown for "
                    f"variant {self.config.variant!r}; has {list(values)}"
                )
        return found

    def _shard_names(self) -> list[str]:
        index = self.directory / INDEX_NAME
        if not index.is_file():
            return [WEIGHTS_NAME]
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if any(Path(name).name != name for name in names):
                raise ValueError("a shard is not beside it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: no index of shards ({error})") from error
        return sorted(names)

    def _open_shards(self) -> dict[str, Any]:
        files = self._shard_names()
        shards: dict[str, Any] = {}  # tensor name -> the open file that has it
        for file in files:
            path = self.directory / file
            if not path.is_file():
                raise CheckpointError(f"{self.directory}: no {file} beside config.json")
            try:
                handle = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: truncated or not safetensors ({error})") from error
            shards |= {key: handle for key in handle.keys()}
        return shards

    def _read(self, key: str) -> Tensor:
        if key not in self._shards:
            raise CheckpointError(f"{self.directory}: tensor {key} is missing")
        return self._shards[key].get_tensor(key)

    def _make(self, name: str) -> Tensor:
        head, _, leaf = name.rpartition(".")
        if head == "rope":
            return dict(zip(("cos", "sin"), rope_tables(self.config), strict=True))[leaf]
        if name == "norm":
            return self._read("model.norm.weight").float()
        if head in ("embed", "head"):
            source = "model.embed_tokens" if head == "embed" else "lm_head"
            if self.config.is_ternary and (bits := table_bits(self.config)[head]) in grouped.BITS:
                return self._grouped_table(source, bits)[leaf]
            return self._table(source, leaf)
        _, layer, rest = name.split(".", 2)
        prefix = f"model.layers.{layer}."
        if rest in _NORMS:
            return self._read(f"{prefix}{_NORMS[rest]}.weight").float()
        linear = rest.split(".")[0]
        parts = [self._linear(prefix + source, linear, leaf) for source in _LINEARS[linear]]
        return torch.cat(parts)

    def _table(self, source: str, leaf: str) -> Tensor:
        weight = self._read(f"{source}.weight")
        if not self.config.is_ternary:
            return weight.half()
        if weight.dtype == torch.int8:
            return (
                weight
                if leaf == "table"
                else self._read(f"{source}.weight_scale").float().reshape(-1)
            )
        codes, scale = quantizers.int8_absmax(weight)
        return codes if leaf == "table" else scale.reshape(-1)

    def _grouped_table(self, source: str, bits: int) -> dict[str, Tensor]:
        """Both tensors of a table of `model.grouped`, kept until the other one is asked for."""
        if source not in self._grouped:
            weight = self._read(f"{source}.weight")
            if weight.dtype == torch.int8:
                weight = weight * self._read(f"{source}.weight_scale").float().reshape(-1, 1)
            codes, group, scale = grouped.quantize(weight, bits)
            self._grouped = {source: {"table": grouped.pack(codes, group, bits), "scale": scale}}
        return self._grouped[source]

    def _linear(self, source: str, linear: str, leaf: str) -> Tensor:
        """One projection's rows: its ternary weights, its float16 weights, or its scale a row."""
        weight = self._read(f"{source}.weight")
        if not self.config.is_ternary:
            return weight.half()
        if weight.dtype != torch.uint8 and f"{source}.weight_scale" not in self._shards:
            codes, alpha = quantizers.ternary_absmean(weight)
            return codes if leaf == "w" else alpha.reshape(1).repeat(weight.shape[0])
        rows = self._rows(source, linear)
        if leaf == "w":
            if weight.dtype == torch.uint8:
                return packing.unpack_ternary(weight, rows)
            return _ternary_floats(weight)
        scale = self._read(f"{source}.weight_scale").float().reshape(1)
        return (1.0 / scale if self._scale_is_inverse else scale).repeat(rows)

    def _rows(self, source: str, linear: str) -> int:
        """Outputs of one projection; a packed tensor's own shape is rounded up to four."""
        if linear != "qkv":
            return linear_shapes(self.config)[linear][0]
        return self.config.attention_size if source.endswith("q_proj") else self.config.kv_size


def _ternary_floats(weight: Tensor) -> Tensor:
    """Floats of -1, 0, 1 as int8: how transformers saves an offline model that it has unpacked."""
    codes = weight.to(torch.int8)
    if (codes != weight).any() or codes.abs().max() > 1:
        raise ValueError("has a weight_scale, but is neither packed nor of -1, 0, 1")
    return codes


def load_integer_model(directory: Path | str, head_bits: int | None = None) -> IntegerModel:
    """The torch reference of a checkpoint, all weights in memory (1 byte a ternary weight)."""
    weights = IntegerWeights(directory, head_bits)
    model = IntegerModel(weights.config)
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.from_numpy(weights[name]))
    return model
