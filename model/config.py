"""The shape of a BitNet model, read from and written to a Hugging Face style config.json.

`MODELS` holds the rows known by name: the sizes of the BitNet a4.8 paper (arXiv 2411.04965),
b1.58-2B-4T (arXiv 2504.12285), the model trained in this repository and a tiny one for tests.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from model import grouped

VARIANTS = ("a4.8", "b1.58", "llama")
ACTIVATION_FORMATS = ("int4", "fp4")
KV_BITS = (16, 4, 3)
MODEL_TYPES = ("bitnet", "llama")
QUANTIZATION_MODES = ("online", "offline")  # transformers: latent weights | packed ternary ones
CONFIG_NAME = "config.json"
# What transformers means by a field that config.json leaves out; ours always write all of theirs.
_TRANSFORMERS_DEFAULTS = {
    "bitnet": {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "llama": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False},
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


MAX_COLUMNS = 2**17  # of a matmul: sums of 64 w q, of codes 2 * 64 too, and of INT8 by INT8


@dataclass(frozen=True)
class ModelConfig:
    """One model. Sizes are in elements; `head_dim` 0 means hidden_size / num_attention_heads."""

    name: str
    variant: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    activation_format: str = "int4"  # of the hybrid stage of a4.8
    kv_bits: int = 16  # what the reference attends over; 3 keeps position 0 at 4 bit
    topk_fraction: float = 0.5  # share of the o_proj input that a4.8 keeps
    head_bits: int = 8  # of the head's table, and of the embedding's where it is tied to it
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self) -> None:
        self._check_types()
        if not self.head_dim and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
            self._require(
                self.hidden_size % self.num_attention_heads == 0,
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}",
            )
        self._require_one_of("variant", VARIANTS)
        self._require_one_of("activation_format", ACTIVATION_FORMATS)
        self._require_one_of("kv_bits", KV_BITS)
        self._check_sizes()
        self._check_head()

    def _check_types(self) -> None:
        wanted = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), cast(type, field.type)
            if kind is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, field.name, value)
            good = type(value) is kind and (type(value) is not float or math.isfinite(value))
            self._require(good, f"{field.name} must be {wanted[kind]}, found {value!r}")

    def _check_sizes(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and not field.name.endswith("token_id"):
                self._require(
                    value > 0, f"{field.name} must be a positive integer, found {value!r}"
                )
        for name in ("hidden_size", "intermediate_size"):
            found = getattr(self, name)
            self._require(
                found < MAX_COLUMNS,
                f"{name} is {found}; possible: below {MAX_COLUMNS}, what int32 sums hold",
            )
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        self._require(
            heads % kv_heads == 0,
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
        )
        # 4 and not 8: the paper's 3B has heads of 100.
        self._require(
            self.head_dim % 4 == 0, f"head_dim must be a multiple of 4, found {self.head_dim}"
        )
        self._require(
            0.0 < self.topk_fraction <= 1.0,
            f"topk_fraction must be in (0, 1], found {self.topk_fraction}",
        )
        self._require(self.rope_theta > 0, f"rope_theta must be > 0, found {self.rope_theta}")
        self._require(self.rms_norm_eps > 0, f"rms_norm_eps must be > 0, found {self.rms_norm_eps}")
        for field_name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, field_name)
            self._require(
                0 <= value < self.vocab_size,
                f"{field_name} must be below vocab_size {self.vocab_size}, found {value!r}",
            )

    def _check_head(self) -> None:
        possible = grouped.TABLE_BITS if self.is_ternary else (8,)  # float16 in fact
        self._require_one_of("head_bits", possible)
        if self.head_bits in grouped.BITS:
            problem = grouped.why_not(self.hidden_size, self.head_bits)
            self._require(not problem, f"head_bits {self.head_bits}: {problem}; possible: 8")

    def _require(self, good: bool, problem: str) -> None:
        if not good:
            raise ConfigError(f"config {self.name!r}: {problem}")

    def _require_one_of(self, field_name: str, possible: tuple) -> None:
        value = getattr(self, field_name)
        self._require(value in possible, f"{field_name} {value!r} is unknown; has {list(possible)}")

    @property
    def attention_size(self) -> int:
        """Width of the o_proj input."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of the k_proj and v_proj outputs."""
        return self.num_key_value_heads * self.head_dim

    @property
    def topk(self) -> int:
        """How many elements of an o_proj input survive TopK (a half, rounded down [D])."""
        return max(1, int(self.attention_size * self.topk_fraction))

    @property
    def is_ternary(self) -> bool:
        return self.variant != "llama"

    @property
    def num_parameters(self) -> int:
        """Weights of the linear layers and the embedding (norms, under 0.1 %, not counted)."""
        attention = 2 * self.hidden_size * (self.attention_size + self.kv_size)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings

    def replace(self, **changes) -> "ModelConfig":
        """The same model with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def with_variant(self, variant: str) -> "ModelConfig":
        """The same shape as another variant; only a4.8 quantises the KV cache."""
        kv_bits = (3 if self.kv_bits == 16 else self.kv_bits) if variant == "a4.8" else 16
        return self.replace(variant=variant, kv_bits=kv_bits)

    def save(self, directory: Path | str, quantization_mode: str | None = None) -> Path:
        """Write config.json; `quantization_mode` says how the weights beside it are stored."""
        values = dataclasses.asdict(self)
        values["model_type"] = "bitnet" if self.is_ternary else "llama"
        values["architectures"] = [
            "BitNetForCausalLM" if self.is_ternary else "LlamaForCausalLM",
        ]
        values["hidden_act"] = "relu2" if self.is_ternary else "silu"
        if quantization_mode is not None:
            if quantization_mode not in QUANTIZATION_MODES:
                raise ConfigError(
                    f"config {self.name!r}: quantization_mode {quantization_mode!r} is unknown; "
                    f"has {list(QUANTIZATION_MODES)}"
                )
            values["quantization_config"] = {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": quantization_mode,
            }
        path = Path(directory) / CONFIG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path | str) -> "ModelConfig":
        """Read config.json, given itself or its directory; what transformers wrote is read too."""
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(
                f"config: {path} is not JSON: {error}; possible: a checkpoint's config.json"
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(f"config: {path} must hold a JSON object")
        try:
            return cls.from_dict(values, default_name=path.resolve().parent.name)
        except ConfigError as error:
            raise ConfigError(f"{error} (in {path})") from error

    @classmethod
    def from_dict(cls, values: dict, default_name: str = "model") -> "ModelConfig":
        """From the object in config.json; missing fields take transformers' meaning."""
        values = {key: value for key, value in values.items() if value is not None}
        values = {"name": default_name} | values
        kind = values.get("model_type")
        if kind not in MODEL_TYPES:
            raise ConfigError(f"config: model_type {kind!r} is unknown; has {list(MODEL_TYPES)}")
        for flag in ("attention_bias", "mlp_bias"):
            if values.get(flag):
                raise ConfigError(f"config {values['name']!r}: {flag} is unknown; has no biases")
        values.setdefault("variant", "llama" if kind == "llama" else "b1.58")
        if (values["variant"] == "llama") != (kind == "llama"):
            raise ConfigError(
                f"config {values['name']!r}: variant {values['variant']!r} is unknown for "
                f"model_type {kind!r}"
            )
        activation = "silu" if kind == "llama" else "relu2"
        if values.get("hidden_act", activation) != activation:
            raise ConfigError(
                f"config {values['name']!r}: hidden_act {values['hidden_act']!r} is unknown for "
                f"variant {values['variant']!r}; has ['{activation}']"
            )
        _read_rope(values)
        values = _TRANSFORMERS_DEFAULTS[kind] | values
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        names = {field.name for field in dataclasses.fields(cls)}
        known = {key: value for key, value in values.items() if key in names}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(required - known.keys()):
            raise ConfigError(f"config {values['name']!r}: missing {', '.join(missing)}")
        return cls(**known)


def _read_rope(values: dict) -> None:
    """Move rope_theta out of transformers 5's `rope_parameters`; refuse scaled RoPE."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"config {values['name']!r}: rope_parameters must be an object")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ConfigError(
            f"config {values['name']!r}: rope_type {rope_type!r} is unknown; has ['default']"
        )
    if "rope_theta" in rope:
        values.setdefault("rope_theta", rope["rope_theta"])


def _paper(name: str, hidden: int, glu: int, heads: int, layers: int) -> ModelConfig:
    """A row of table 'Model configurations' of arXiv 2411.04965, LLaMA tokenizer."""
    return ModelConfig(
        name=f"bitnet-a4.8-{name}",
        variant="a4.8",
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=glu,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_bits=3,
    )


_ROWS = (
    _paper("700m", 1536, 4096, 24, 24),
    _paper("1.3b", 2048, 5460, 32, 24),
    _paper("3b", 3200, 8640, 32, 26),
    _paper("7b", 4096, 11008, 32, 32),
    ModelConfig(  # https://huggingface.co/microsoft/bitnet-b1.58-2B-4T
        name="bitnet-b1.58-2b-4t",
        variant="b1.58",
        vocab_size=128256,
        hidden_size=2560,
        intermediate_size=6912,
        num_hidden_layers=30,
        num_attention_heads=20,
        num_key_value_heads=5,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_id=128001,
    ),
    ModelConfig(  # trained by model/train.py on public-domain novels
        name="novels-42m",
        variant="a4.8",
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        kv_bits=3,
        bos_token_id=0,
        eos_token_id=1,
    ),
    ModelConfig(
        name="tiny",
        variant="a4.8",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        kv_bits=3,
        bos_token_id=0,
        eos_token_id=1,
    ),
)
MODELS = {row.name: row for row in _ROWS}
