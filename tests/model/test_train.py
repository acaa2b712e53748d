"""The trainer: schedule, exact resume, the files it leaves, the errors it gives."""

import json
import lzma

import numpy as np
import pytest
import torch
from safetensors import safe_open

from model import train
from model.config import ModelConfig
from model.data import DataError, Windows, bos_shifted, prepare
from model.packing import unpack_ternary
from model.quantizers import ternary_absmean
from model.trainer import Recipe, Trainer, TrainError

WORDS = "the of and to in he was that his it her had as with for she not at but on".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of two splits of seeded nonsense, a few books each."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, books in (("train", 3), ("valid", 2)):
        text = "\n\n\n".join(
            "\n".join(" ".join(generator.choice(WORDS, 30)) for _ in range(40))
            for _ in range(books)
        )
        (folder / f"{split}.txt.xz").write_bytes(lzma.compress(text.encode()))
    return folder


def arguments(data, run, *more):
    return [
        f"--data={data}", f"--run={run}", "--model=tiny", "--batch=2", "--seq=32", "--tokens=768",
        "--eval-every=6", "--log-every=4", "--eval-tokens=128", "--device=cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    assert train.main(arguments(data, run, "--save-dtype=float32")) == 0
    return run


def checkpoint(run):
    with safe_open(run / "checkpoint.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return json.loads(file.metadata()["facts"]) | {"tensors": tensors}


def test_a_finished_run_leaves_its_files(finished):
    names = {path.name for path in (finished / "packed").iterdir()}
    assert names == {
        "config.json", "curve.csv", "curve.png", "metrics.json", "model.safetensors",
        "sample.txt", "tokenizer.json",
    }  # fmt: skip
    metrics = json.loads((finished / "packed" / "metrics.json").read_text())
    assert set(metrics["validation_loss"]) == {"a8", "hybrid", "hybrid_int8_embedding"}
    assert len(metrics["sparsity"]["by_layer"]) == 2
    assert metrics["sparsity"]["mean"]["out"] >= 0.5
    assert metrics["tokens"] == 768
    assert ModelConfig.load(finished / "final").name == "tiny"
    curve = (finished / "curve.csv").read_text().splitlines()
    assert len(curve) == 3 and curve[-1].split(",")[2] == "hybrid"


def test_packed_weights_are_the_latent_ones_quantised(finished):
    from safetensors.torch import load_file

    latent = load_file(finished / "final" / "model.safetensors")
    packed = load_file(finished / "packed" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    codes, scale = ternary_absmean(latent[name])
    assert torch.equal(unpack_ternary(packed[name], len(codes)), codes)
    assert packed[f"{name}_scale"].tolist() == [scale.item()]
    table = packed["model.embed_tokens.weight"] * packed["model.embed_tokens.weight_scale"][:, None]
    error = (table - latent["model.embed_tokens.weight"]).abs().amax(dim=1)
    assert (error <= packed["model.embed_tokens.weight_scale"] * 0.501).all()


def test_a_resumed_run_equals_an_uninterrupted_one(data, finished, tmp_path, monkeypatch, capsys):
    step = Trainer.train_step

    def stop_after_five(self):
        loss = step(self)
        if self.step == 5:
            self.stop()
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after_five)
        assert train.main(arguments(data, tmp_path, "--save-dtype=float32")) == 0
    assert "resume with the same command" in capsys.readouterr().out
    assert checkpoint(tmp_path)["step"] == 5
    assert train.main(arguments(data, tmp_path, "--save-dtype=float32")) == 0
    ours, theirs = checkpoint(tmp_path), checkpoint(finished)
    assert ours["step"] == theirs["step"] == 12
    assert ours["tensors"].keys() == theirs["tensors"].keys()  # weights and moments
    for name, value in ours["tensors"].items():
        assert torch.equal(value, theirs["tensors"][name]), name
    same = [(a["valid_a8"], a["valid_hybrid"]) for a in ours["curve"]]
    assert same == [(a["valid_a8"], a["valid_hybrid"]) for a in theirs["curve"]]


def test_no_time_saves_and_says_how_to_go_on(data, tmp_path, capsys):
    assert train.main(arguments(data, tmp_path, "--minutes=0")) == 0
    assert "saved at step 0; resume with the same command" in capsys.readouterr().out
    assert checkpoint(tmp_path)["step"] == 0


def test_other_options_do_not_resume(data, finished, capsys):
    assert train.main(arguments(data, finished, "--lr=0.5")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "asked for lr 0.5" in error and "0.0015" in error


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (["--data=/nowhere"], "cannot read"),
        (["--seq=100000"], "256 positions"),
        (["--hybrid=2"], "--hybrid 2.0 asked; possible: 0 to 1"),
        (["--tokens=nan"], "--tokens nan asked; possible: a number above 0"),
        (["--tokens=inf"], "--tokens inf asked"),
        (["--tokens=-3"], "--tokens -3.0 asked"),
        (["--lr=nan"], "--lr nan asked"),
        (["--minutes=nan"], "--minutes nan asked; possible: at least 0"),
        (["--device=nosuch"], "--device nosuch asked; possible: cpu"),
        (["--batch=0"], "--batch 0 asked; possible: at least 1"),
        (["--activation-format=fp5"], "has ['int4', 'fp4']"),
        (["--kv-bits=5"], "has [16, 4, 3]"),
    ],
)
def test_a_wrong_option_is_one_line(data, tmp_path, capsys, more, found):
    assert train.main(arguments(data, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert found in error and error.count("\n") == 1


@pytest.mark.parametrize("variant", ["llama", "b1.58"])
def test_variants_train(data, tmp_path, variant):
    assert train.main(arguments(data, tmp_path, f"--variant={variant}")) == 0
    assert (tmp_path / "packed").exists() == (variant != "llama")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    assert config["variant"] == variant
    assert config["model_type"] == ("llama" if variant == "llama" else "bitnet")


def test_a_diverged_run_is_refused(data, tmp_path, monkeypatch, capsys):
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self: step(self) * float("nan"))
    assert train.main(arguments(data, tmp_path)) == 2
    assert "loss is nan at step 4; lower --lr" in capsys.readouterr().err
    assert issubclass(TrainError, ValueError)


def test_learning_rate_has_two_stages():
    recipe = Recipe(
        steps=1000, batch=1, seq=1, lr=3e-3, lr2=2e-3, warmup=100, weight_decay=0.1,
        hybrid_start=850, seed=0,
    )  # fmt: skip
    rates = [recipe.learning_rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(3e-5)
    assert max(rates) == pytest.approx(3e-3, rel=0.05)
    assert rates[499] == pytest.approx(2.5e-3, rel=0.01)
    assert rates[500] == pytest.approx(2e-3)
    assert 0 < rates[999] < 1e-5
    assert [recipe.decay(499), recipe.decay(500)] == [0.1, 0.0]
    assert [recipe.stage(849), recipe.stage(850)] == ["a8", "hybrid"]


def test_windows_cover_an_epoch_once_and_begin_with_bos():
    windows = Windows(torch.arange(1, 101, dtype=torch.int32), bos=0, seq=10)
    inputs, targets = windows.batch(step=0, size=len(windows), seed=3)
    assert (inputs[:, 0] == 0).all()
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert len(set(targets.flatten().tolist())) == targets.numel() == 90
    again, _ = windows.batch(step=0, size=len(windows), seed=3)
    other, _ = windows.batch(step=1, size=len(windows), seed=3)
    assert torch.equal(inputs, again) and not torch.equal(inputs, other)


def test_bos_shifted():
    assert bos_shifted(torch.tensor([[5, 6, 7]]), 0).tolist() == [[0, 5, 6]]


def test_a_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(DataError, match=r"run: asked for .*/run, it cannot be made: .*; possible:"):
        prepare(tmp_path, tmp_path / "run", 300)
