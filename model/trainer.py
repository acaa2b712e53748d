"""The training loop: one recipe, one state, checkpoints that resume exactly.

Batches depend on (seed, step) alone and the checkpoint holds weights, optimizer, step and curve,
so a run cut into pieces gives the weights of one that was not.
"""

import dataclasses
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from model import evaluate, progress
from model.bitnet import BitNetModel
from model.config import ModelConfig
from model.data import load_windows

CHECKPOINT_NAME = "checkpoint.safetensors"
BETAS = (0.9, 0.95)
CLIP = 1.0


class TrainError(ValueError):
    """A run that cannot start; the message is one line for the user."""


@dataclass(frozen=True)
class Recipe:
    """What fixes the result of a run; a checkpoint resumes only under the same one."""

    steps: int
    batch: int  # windows a step
    seq: int  # tokens a window
    lr: float
    lr2: float  # from half-way
    warmup: int  # steps
    weight_decay: float  # on matrices, first half
    hybrid_start: int  # first step of the hybrid stage; `steps` for none
    seed: int

    def learning_rate(self, step: int) -> float:
        half = self.steps // 2
        if step >= half:
            return self.lr2 * (self.steps - step) / (self.steps - half)
        floor = (self.lr + self.lr2) / 2
        rate = self.lr + (floor - self.lr) * step / half
        return rate * min(1.0, (step + 1) / max(1, self.warmup))

    def decay(self, step: int) -> float:
        return self.weight_decay if step < self.steps // 2 else 0.0

    def stage(self, step: int) -> str:
        return "hybrid" if step >= self.hybrid_start else "a8"


@dataclass(frozen=True)
class Options:
    """Where and how to run; none of these changes the weights."""

    data: Path
    run: Path
    device: torch.device
    is_compiled: bool
    deadline: float  # time.monotonic() at which to save and leave
    eval_every: int  # steps
    eval_tokens: int | None
    save_every: int  # steps
    log_every: int  # steps
    save_dtype: torch.dtype


class Trainer:
    """The state of a run and its loop."""

    def __init__(self, config: ModelConfig, recipe: Recipe, options: Options) -> None:
        self.config, self.recipe, self.options = config, recipe, options
        bos, device = config.bos_token_id, options.device
        self.train_windows = load_windows(options.run, "train", bos, recipe.seq, device)
        self.valid_windows = load_windows(options.run, "valid", bos, recipe.seq, device)
        torch.manual_seed(recipe.seed)
        self.model = BitNetModel(config).to(device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        vectors = [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay},
             {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.lr, betas=BETAS, fused=device.type == "cuda",
        )  # fmt: skip
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict] = []
        self.is_stopping = False
        self.resume()
        if options.is_compiled:
            self.model.compile_parts()

    def stop(self, *_) -> None:
        """Signal handler: leave after the step under way."""
        self.is_stopping = True

    def train(self) -> bool:
        """Run until the last step or until told to stop; True when done."""
        with progress.of_run(self.recipe.steps, self.step, sys.stderr) as shown:
            return self._train(shown)

    def _train(self, shown: progress.Lines) -> bool:
        options, recipe = self.options, self.recipe
        began = last = time.monotonic()
        losses: list[torch.Tensor] = []
        logged = self.step
        while self.step < recipe.steps:
            if self.is_stopping or time.monotonic() > options.deadline:
                self.seconds += time.monotonic() - began
                self.save()
                return False
            losses.append(self.train_step())
            shown.advance(self.step)
            is_last = self.step == recipe.steps
            is_eval = is_last or self.step % options.eval_every == 0
            if is_eval or self.step % options.log_every == 0:
                loss = float(torch.stack(losses).mean())  # waits for the device
                rate = (self.step - logged) * recipe.batch * recipe.seq / (time.monotonic() - last)
                self.report(shown, loss, rate)
                if is_eval:
                    self.evaluate(loss, self.seconds + time.monotonic() - began)
                losses, logged, last = [], self.step, time.monotonic()
            if self.step % options.save_every == 0 or is_last:
                self.seconds, began = self.seconds + time.monotonic() - began, time.monotonic()
                self.save()
        return True

    def train_step(self) -> torch.Tensor:
        """One optimizer step; returns the loss on the device, not waited for."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(self.step)
        self.optimizer.param_groups[0]["weight_decay"] = recipe.decay(self.step)
        tokens, targets = self.train_windows.batch(self.step, recipe.batch, recipe.seed)
        with evaluate.autocast(self.options.device):
            loss = self.model.loss(tokens, targets, recipe.stage(self.step))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.detach()

    def report(self, shown: progress.Lines, loss: float, rate: float) -> None:
        """Show the mean loss since the last report and the tokens a second; refuse NaN."""
        step, recipe = self.step, self.recipe
        status = progress.Status(
            step=step,
            steps=recipe.steps,
            stage=recipe.stage(step - 1),
            loss=loss,
            learning_rate=recipe.learning_rate(step - 1),
            tokens_a_second=rate,
            seconds_left=(recipe.steps - step) * recipe.batch * recipe.seq / rate,
        )
        shown.report(status)
        if not math.isfinite(loss):
            raise TrainError(f"train: loss is {loss} at step {step}; lower --lr")

    def evaluate(self, loss: float, seconds: float) -> None:
        """Validate, in both stages for a4.8, and add a row to the curve."""
        recipe, options = self.recipe, self.options
        row = {
            "step": self.step,
            "tokens": self.step * recipe.batch * recipe.seq,
            "stage": recipe.stage(self.step - 1),
            "lr": recipe.learning_rate(self.step - 1),
            "train": loss,
            "seconds": round(seconds, 1),
        }
        for stage in stages_of(self.config):
            row[f"valid_{stage}"] = evaluate.validation_loss(
                self.model, self.valid_windows, recipe.batch, stage, options.eval_tokens
            )
        self.curve.append(row)
        evaluate.write_curve(self.curve, options.run)
        found = " ".join(f"{key} {row[key]:.4f}" for key in row if key.startswith("valid"))
        print(f"eval {self.step}/{recipe.steps} {found}", flush=True)

    def save(self) -> None:
        path = self.options.run / CHECKPOINT_NAME
        partial = path.with_suffix(".partial")
        facts = {
            "recipe": dataclasses.asdict(self.recipe),
            "config": dataclasses.asdict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{name}": value for name, value in moments.items()}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        save_file(tensors, partial, metadata={"facts": json.dumps(facts)})
        partial.replace(path)

    def resume(self) -> None:
        """Take up RUN/checkpoint.safetensors if there is one, refusing another run's."""
        path = self.options.run / CHECKPOINT_NAME
        if not path.exists():
            return
        try:
            with safe_open(path, "pt", device=str(self.options.device)) as file:
                state = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise TrainError(f"train: {path} is no checkpoint ({error}); remove it") from error
        for part, asked in (("config", self.config), ("recipe", self.recipe)):
            for key, value in dataclasses.asdict(asked).items():
                if state[part].get(key) != value:
                    raise TrainError(
                        f"train: asked for {key} {value}, {path} has {state[part].get(key)}; "
                        "give the options it was started with, or another --run"
                    )
        weights: dict[str, torch.Tensor] = {}
        moments: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "model":
                weights[rest] = value
            else:
                index, _, moment = rest.partition("/")
                moments[int(index)][moment] = value
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": dict(moments)})
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]
        print(f"train: resumed {path} at step {self.step}", flush=True)


def stages_of(config: ModelConfig) -> tuple[str, ...]:
    """The stages a variant is evaluated in."""
    return ("a8", "hybrid") if config.variant == "a4.8" else ("a8",)
