"""Train a model: python -m model.train --data DIR --run RUN --model novels-42m --tokens 300e6

The same command resumes from RUN/checkpoint.safetensors, exactly: batches depend on (seed, step)
alone.
The smallest run, on a laptop's CPU:
    python -m model.train --data DIR --run runs/tiny --model tiny --tokens 2e4 --batch 8 --seq 64

Recipe (arXiv 2411.04965 and the b1.58 training notes): AdamW (0.9, 0.95), clipping at 1.0;
weight decay 0.1 on matrices for the first half of the steps, then none; the learning rate warms
up, falls linearly to the mean of lr and lr2 at half-way, drops to lr2 and falls linearly to 0 [D:
the paper gives the two levels]. a4.8: the last --hybrid share of the steps uses the INT4/TopK
activations and keeps the optimizer's state.

Written: RUN/{checkpoint.safetensors,curve.csv,curve.png,tokenizer.json}; on finishing RUN/final
(latent weights) and RUN/packed (two-bit weights, metrics.json, sample.txt, curve and tokenizer).
"""

import argparse
import dataclasses
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from command_line import Parser, refuse
from model import evaluate
from model.bitnet import BitNetModel
from model.config import MODELS, VARIANTS, ConfigError, ModelConfig
from model.data import TOKENIZER_NAME, DataError, Windows, load_windows, prepare
from model.packing import write_latent, write_packed
from model.trainer import Options, Recipe, Trainer, TrainError, stages_of

SAMPLE_PROMPTS = ("The old man looked at her and said", "It was a dark and stormy night")
SAMPLE_TOKENS = 120
SPARSITY_TOKENS = 131_072
SPARSITY_BATCH = 8  # eager, so every intermediate is in memory
PACKED_LIMIT = 16 * 2**20  # bytes; a packed model above this is said so


def finish(trainer: Trainer) -> Path:
    """Write RUN/final and, for ternary weights, RUN/packed; returns the folder with the report."""
    config, recipe, options = trainer.config, trainer.recipe, trainer.options
    state = trainer.model.state_dict()
    model = BitNetModel(config).to(options.device)  # not compiled: hooks, growing sequences
    model.load_state_dict(state)
    final, folder = options.run / "final", options.run / "final"
    size = write_latent(state, config, final, options.save_dtype)
    if config.is_ternary:
        folder = options.run / "packed"
        size = write_packed(state, config, folder)
    metrics = {
        "model": config.name,
        "variant": config.variant,
        "parameters": config.num_parameters,
        "weights_bytes": size,
        "tokens": recipe.steps * recipe.batch * recipe.seq,
        "epochs": round(recipe.steps * recipe.batch / len(trainer.train_windows), 3),
        "seconds": round(trainer.seconds, 1),
        "device": device_name(options.device),
        "torch": torch.__version__,
        "recipe": dataclasses.asdict(recipe),
        "validation_loss": final_losses(trainer),
    }
    stage = stages_of(config)[-1]
    if stage == "hybrid":
        metrics["sparsity"] = evaluate.sparsity(
            model, trainer.valid_windows, SPARSITY_BATCH, SPARSITY_TOKENS
        )
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for directory in {final, folder}:
        shutil.copy(options.run / TOKENIZER_NAME, directory)
    evaluate.write_curve(trainer.curve, folder)
    tokenizer = read_tokenizer(options.run)
    samples = [
        evaluate.sample_text(model, tokenizer, prompt, stage, SAMPLE_TOKENS)
        for prompt in SAMPLE_PROMPTS
    ]
    (folder / "sample.txt").write_text("\n\n".join(samples) + "\n", encoding="utf-8")
    if size > PACKED_LIMIT:
        print(f"train: {folder} weights are {size:,} bytes, over {PACKED_LIMIT:,}", flush=True)
    return folder


def final_losses(trainer: Trainer) -> dict[str, float]:
    """Validation loss in each stage on every whole batch, and with the embedding at INT8."""
    model, recipe, stages = trainer.model, trainer.recipe, stages_of(trainer.config)
    losses = {
        stage: evaluate.validation_loss(model, trainer.valid_windows, recipe.batch, stage)
        for stage in stages
    }
    if trainer.config.is_ternary:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(evaluate.with_int8_embedding(state))
        name = f"{stages[-1]}_int8_embedding"
        losses[name] = evaluate.validation_loss(
            model, trainer.valid_windows, recipe.batch, stages[-1]
        )
        model.load_state_dict(state)
    return {name: round(value, 5) for name, value in losses.items()}


def read_tokenizer(run: Path):
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(run / TOKENIZER_NAME))
    except Exception as error:  # tokenizers raises Exception itself
        raise TrainError(
            f"train: {run / TOKENIZER_NAME} is no tokenizer: {error}; possible: another --run"
        ) from error


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m model.train", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with train.txt.xz and valid.txt.xz")
    add("--run", type=Path, required=True, help="folder of the run; resumed if it has a checkpoint")
    add("--model", default="novels-42m", choices=MODELS)
    add("--variant", choices=VARIANTS, help="default: the model's")
    add("--activation-format", help="int4 or fp4, of the hybrid stage")
    add("--kv-bits", type=int, help="16, 4 or 3, of the hybrid stage")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=float, help="tokens to train on")
    length.add_argument("--epochs", type=float, default=10.0, help="passes over the text (10)")
    add("--batch", type=int, default=64, help="sequences a step (64)")
    add("--seq", type=int, default=1024, help="tokens a sequence (1024)")
    add("--hybrid", type=float, default=0.15, help="share of the steps, at the end (0.15)")
    add("--lr", type=float, default=1.5e-3, help="peak learning rate (1.5e-3)")
    add("--lr2", type=float, help="learning rate from half-way (2/3 of --lr)")
    add("--warmup", type=int, default=375, help="steps, at most a tenth of the run (375)")
    add("--weight-decay", type=float, default=0.1, help="on matrices, first half (0.1)")
    add("--seed", type=int, default=0)
    add("--minutes", type=float, help="save and leave after so many minutes")
    add("--eval-every", type=int, default=250, help="steps (250)")
    add("--eval-tokens", type=int, help="validation tokens while training (all)")
    add("--save-every", type=int, default=1000, help="steps (1000)")
    add("--log-every", type=int, default=50, help="steps (50)")
    add("--save-dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", default="auto", choices=("auto", "on", "off"), help="auto: on CUDA")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> None:
    """What can be refused before the text is read."""
    for name in ("batch", "seq", "eval_every", "save_every", "log_every"):
        require(arguments, name, lambda value: value >= 1, "at least 1")
    for name in ("tokens", "epochs", "lr", "lr2"):
        require(arguments, name, lambda value: 0 < value < math.inf, "a number above 0")
    require(arguments, "weight_decay", lambda value: 0 <= value < math.inf, "at least 0")
    require(arguments, "minutes", lambda value: value >= 0, "at least 0")
    require(arguments, "hybrid", lambda value: 0 <= value <= 1, "0 to 1")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch is a CPU build
        here = ", ".join(["cpu"] + ["cuda"] * torch.cuda.is_available())
        raise TrainError(f"train: --device {arguments.device} asked; possible: {here}") from error


def require(
    arguments: argparse.Namespace, name: str, holds: Callable[[float], bool], possible: str
) -> None:
    value = getattr(arguments, name)
    if value is not None and not holds(value):
        option = f"--{name.replace('_', '-')}"
        raise TrainError(f"train: {option} {value} asked; possible: {possible}")


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    config = MODELS[arguments.model]
    if arguments.variant:
        config = config.with_variant(arguments.variant)
    changes = {
        name: getattr(arguments, name)
        for name in ("activation_format", "kv_bits")
        if getattr(arguments, name) is not None
    }
    config = config.replace(**changes)
    if arguments.seq > config.max_position_embeddings:
        raise TrainError(
            f"train: --seq {arguments.seq} asked, {config.name} has "
            f"{config.max_position_embeddings} positions; possible: at most so many"
        )
    return config


def make_recipe(arguments: argparse.Namespace, config: ModelConfig, windows: Windows) -> Recipe:
    tokens = arguments.tokens or arguments.epochs * len(windows) * arguments.seq
    steps = max(2, int(tokens) // (arguments.batch * arguments.seq))
    share = arguments.hybrid if config.variant == "a4.8" else 0.0
    return Recipe(
        steps=steps,
        batch=arguments.batch,
        seq=arguments.seq,
        lr=arguments.lr,
        lr2=arguments.lr2 if arguments.lr2 is not None else arguments.lr * 2 / 3,
        warmup=min(arguments.warmup, steps // 10),
        weight_decay=arguments.weight_decay,
        hybrid_start=steps - round(steps * share),
        seed=arguments.seed,
    )


def make_options(arguments: argparse.Namespace, began: float) -> Options:
    device = torch.device(arguments.device)
    minutes = math.inf if arguments.minutes is None else arguments.minutes
    return Options(
        data=arguments.data,
        run=arguments.run,
        device=device,
        is_compiled={"on": True, "off": False}.get(arguments.compile, device.type == "cuda"),
        deadline=began + 60 * minutes,
        eval_every=arguments.eval_every,
        eval_tokens=arguments.eval_tokens,
        save_every=arguments.save_every,
        log_every=arguments.log_every,
        save_dtype=getattr(torch, arguments.save_dtype),
    )


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    arguments = parse(argv)
    torch.set_float32_matmul_precision("high")
    try:
        check(arguments)
        config = model_config(arguments)
        options = make_options(arguments, began)
        prepare(options.data, options.run, config.vocab_size)
        windows = load_windows(
            options.run, "train", config.bos_token_id, arguments.seq, torch.device("cpu")
        )
        recipe = make_recipe(arguments, config, windows)
        trainer = Trainer(config, recipe, options)
        print(
            f"train: {config.name} {config.variant}, {config.num_parameters / 1e6:.1f} M weights, "
            f"{recipe.steps} steps of {recipe.batch * recipe.seq} tokens, hybrid from step "
            f"{recipe.hybrid_start}, on {device_name(options.device)}",
            flush=True,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, trainer.stop)
        if not trainer.train():
            print(f"train: saved at step {trainer.step}; resume with the same command")
            return 0
        folder = finish(trainer)
    except (ConfigError, DataError, TrainError) as error:
        return refuse("model.train", error)
    print(f"train: done, {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
