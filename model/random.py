"""Write a checkpoint of any known shape with random weights, so that speed can be measured.

    python -m model.random --config tiny --variant a4.8 -o /tmp/tiny
    python -m model.random --config bitnet-b1.58-2b-4t --variant a4.8 -o dist/random-2b

Random ternary weights alone leave half of the gates positive. For a4.8 the checkpoint is shaped so
that the activation sparsity met at run time is the paper's 7B row (arXiv 2411.04965 table 3):
- the embedding rows share a direction u; every gate row is tilted against u, by as much as makes
  67 % of the gates non-positive;
- the gains of ffn_sub_norm are log-normal, so wide that 84 % of the down_proj input rounds to 0;
- o_proj and down_proj scale so that the layers add little to u: every layer meets the same input.
Both amounts are found by bisection on a simulated layer, whose measured zeros are printed.
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from command_line import Parser, refuse
from model import packing, quantizers
from model.config import MODELS, VARIANTS, ConfigError, ModelConfig
from model.integer import linear_shapes

GATE_ZEROS = 0.67  # share of gates <= 0, a4.8's 7B
DOWN_ZEROS = 0.84  # share of zeros at the down_proj input, a4.8's 7B
SHARED = 0.5  # share of the embedding's energy along u
SIMULATED_ROWS = 64
BISECTIONS = 24
NAME_PREFIX = "random-"  # of a configuration written here


def random_packed(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Ternary weights, uniform, in the packed layout: u8[ceil(n/4), k]."""
    codes = torch.arange(81)
    bytes_ = sum((codes // 3**i % 3) << 2 * i for i in range(4)).to(torch.uint8)
    shape = (-(-n // 4), k)
    return bytes_[torch.randint(0, 81, shape, generator=generator, dtype=torch.uint8).int()]


def tilted(packed: Tensor, n: int, direction: Tensor, share: float, generator) -> Tensor:
    """The same weights with a random `share` of each row replaced by -sign(direction)."""
    codes = packing.unpack_ternary(packed, n)
    chosen = torch.rand(codes.shape, generator=generator) < share
    return packing.pack_ternary(torch.where(chosen, -direction.to(torch.int8), codes))


class Shape:
    """How far to tilt the gates and spread the gains, found on one simulated a4.8 layer."""

    def __init__(self, config: ModelConfig, direction: Tensor, generator: torch.Generator) -> None:
        hidden, glu = config.hidden_size, config.intermediate_size
        noise = torch.randn(SIMULATED_ROWS, hidden, generator=generator)
        x = math.sqrt(SHARED) * direction + math.sqrt(1 - SHARED) * noise
        q, _ = quantizers.int4_absmean(x)
        gate, up = (random_packed(glu, hidden, generator) for _ in range(2))
        self.up = q.float() @ packing.unpack_ternary(up, glu).float().T
        self.gate_codes, self.q, self.direction = packing.unpack_ternary(gate, glu), q, direction
        self.chance = torch.rand(self.gate_codes.shape, generator=generator)
        self.spread_noise = torch.randn(glu, generator=generator)
        self.tilt, self.gate_zeros = _bisect(self._gate_zeros, GATE_ZEROS, 0.5)
        self.gate = self._gate(self.tilt)
        self.spread, self.down_zeros = _bisect(self._down_zeros, DOWN_ZEROS, 4.0)

    def _gate(self, tilt: float) -> Tensor:
        codes = torch.where(self.chance < tilt, -self.direction.to(torch.int8), self.gate_codes)
        return self.q.float() @ codes.float().T

    def _gate_zeros(self, tilt: float) -> float:
        return float((self._gate(tilt) <= 0).float().mean())

    def _down_zeros(self, spread: float) -> float:
        glu = self.gate.clamp_min(0).square() * self.up
        h = glu / glu.square().mean(-1, keepdim=True).sqrt() * (spread * self.spread_noise).exp()
        return float((quantizers.int8_absmax(h)[0] == 0).float().mean())


def _bisect(measure, wanted: float, high: float) -> tuple[float, float]:
    """x in [0, high] with measure(x) ~ wanted, measure rising; and what was measured there."""
    low = 0.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) < wanted else (low, middle)
    return high, measure(high)


def random_tensors(config: ModelConfig, seed: int) -> tuple[dict[str, Tensor], Shape | None]:
    """Every tensor of the checkpoint by its Hugging Face name."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randint(0, 2, (config.hidden_size,), generator=generator) * 2 - 1
    shape = Shape(config, direction, generator) if config.variant == "a4.8" else None
    tensors = _tables(config, direction, generator)
    tensors["model.norm.weight"] = torch.ones(config.hidden_size)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + name: value
            for name, value in _layer(config, direction, shape, generator).items()
        }
    return tensors, shape


def _tables(config: ModelConfig, direction: Tensor, generator) -> dict[str, Tensor]:
    tensors = {}
    names = ["model.embed_tokens"] + ([] if config.tie_word_embeddings else ["lm_head"])
    for name in names:
        size = (config.vocab_size, config.hidden_size)
        if not config.is_ternary:
            tensors[f"{name}.weight"] = torch.randn(size, generator=generator).half() * 0.02
            continue
        table = torch.empty(size, dtype=torch.int8)
        for part in table.split(8192):  # 2B-4T's float table would be 1.3 GB
            noise = torch.randn(part.shape, generator=generator)
            row = math.sqrt(SHARED) * direction + math.sqrt(1 - SHARED) * noise
            part.copy_((row * 28).round().clamp(-127, 127))
        tensors[f"{name}.weight"] = table
        tensors[f"{name}.weight_scale"] = torch.full((config.vocab_size,), 1 / 28)
    return tensors


def _layer(config: ModelConfig, direction, shape: Shape | None, generator) -> dict[str, Tensor]:
    shapes = dict(linear_shapes(config))
    del shapes["qkv"]
    kv = (config.kv_size, config.hidden_size)
    shapes |= {"q": (config.attention_size, config.hidden_size), "k": kv, "v": kv}
    tensors = _norms(config, shape, generator)
    # Together the 2L outputs add a tenth of the energy that the embedding has.
    output_std = math.sqrt(0.1 / (2 * config.num_hidden_layers))
    for name, (n, k) in shapes.items():
        full = ("mlp." if name in ("gate", "up", "down") else "self_attn.") + f"{name}_proj.weight"
        if not config.is_ternary:
            tensors[full] = torch.randn(n, k, generator=generator).half() / math.sqrt(k)
            continue
        packed = random_packed(n, k, generator)
        if shape is not None and name == "gate":
            packed = tilted(packed, n, direction, shape.tilt, generator)
        tensors[full] = packed
        std = output_std if name in ("o", "down") else 1.0
        tensors[f"{full}_scale"] = torch.tensor([std / math.sqrt(k * 2 / 3)])
    return tensors


def _norms(config: ModelConfig, shape: Shape | None, generator) -> dict[str, Tensor]:
    hidden, glu = config.hidden_size, config.intermediate_size
    tensors = {
        "input_layernorm.weight": torch.ones(hidden),
        "post_attention_layernorm.weight": torch.ones(hidden),
    }
    if config.is_ternary:
        gain = torch.ones(glu)
        if shape is not None:
            gain = (shape.spread * torch.randn(glu, generator=generator)).exp()
        tensors["mlp.ffn_sub_norm.weight"] = gain / gain.square().mean().sqrt()
        tensors["self_attn.attn_sub_norm.weight"] = torch.ones(config.attention_size)
    return tensors


def write(config: ModelConfig, directory: Path, seed: int = 0) -> Shape | None:
    """Write config.json and model.safetensors; returns the simulated layer of an a4.8 model.

    Only an empty directory or an earlier random checkpoint is written over: FileExistsError.
    """
    refuse_foreign(directory)
    tensors, shape = random_tensors(config, seed)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{packing.WEIGHTS_NAME}.partial"
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(0o644)
        partial.replace(directory / packing.WEIGHTS_NAME)
    finally:
        partial.unlink(missing_ok=True)
    config.save(directory, "offline" if config.is_ternary else None)
    return shape


def refuse_foreign(directory: Path) -> None:
    """A trained checkpoint is not to be lost to a mistyped -o."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is no directory; possible: a new one")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    try:
        name = ModelConfig.load(directory).name
    except ConfigError:
        name = ""
    if not name.startswith(NAME_PREFIX):
        raise FileExistsError(
            f"{directory} holds other files; possible: a new directory, or one with an earlier "
            "random checkpoint"
        )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m model.random", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, choices=sorted(MODELS), metavar="NAME",
                        help=f"shape: {', '.join(sorted(MODELS))}")  # fmt: skip
    parser.add_argument("--variant", choices=VARIANTS, help="default: the configuration's own")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    config = MODELS[args.config]
    try:
        config = config.with_variant(args.variant or config.variant)
        config = config.replace(name=f"{NAME_PREFIX}{config.name}-{config.variant}")
        shape = write(config, args.output, args.seed)
    except (ConfigError, FileExistsError) as error:
        return refuse("model.random", error)
    except OSError as error:
        problem = f"output: cannot write {args.output}: {error.strerror or error}"
        return refuse("model.random", f"{problem}; possible: -o with a folder of yours")
    size = (args.output / packing.WEIGHTS_NAME).stat().st_size
    print(f"model    {config.name}, {config.num_parameters / 1e9:.2f} B weights")
    print(f"size     {size / 2**20:.0f} MiB")
    print(f"where    {args.output}")
    if shape is not None:
        print(
            f"zeros    gate {shape.gate_zeros:.1%}, down {shape.down_zeros:.1%} (simulated layer)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
