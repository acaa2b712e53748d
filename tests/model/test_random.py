"""Random checkpoints: they load, and an a4.8 one meets the sparsity of the paper when it runs."""

import json

import numpy as np
import pytest
import torch
from tiny_models import rows_of

from model import ops, random
from model.checkpoint import IntegerWeights, load_integer_model
from model.config import MODELS, ModelConfig
from model.integer import IntegerModel


def write(directory, config: ModelConfig, seed: int = 0) -> IntegerModel:
    random.write(config, directory, seed)
    return load_integer_model(directory)


@pytest.mark.parametrize("variant", [None, "a4.8", "b1.58", "llama"])
def test_the_command_writes_a_checkpoint_that_loads(tmp_path, capsys, variant):
    arguments = ["--config", "tiny", "-o", str(tmp_path / "out")]
    arguments += ["--variant", variant] if variant else []
    assert random.main(arguments) == 0
    told = capsys.readouterr().out
    variant = variant or "a4.8"
    assert f"random-tiny-{variant}" in told and str(tmp_path / "out") in told
    assert ("zeros    gate" in told) == (variant == "a4.8")
    model = load_integer_model(tmp_path / "out")
    assert model.config.variant == variant
    assert model.config.replace(name="tiny") == MODELS["tiny"].with_variant(variant)
    tokens = torch.arange(2, 8)[None]
    x, _ = model.trunk(*rows_of(tokens), model.empty_caches(16, 1, 6), 16)
    logits = model.logits(x)
    assert torch.isfinite(logits).all() and logits.std() > 0


def test_an_unknown_config_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        random.main(["--config", "huge", "-o", str(tmp_path)])
    assert exit_.value.code == 2
    assert "invalid choice: 'huge'" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert random.main(["--config", "tiny", "-o", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(
        f"model.random: error: {tmp_path / 'file'} is no directory; possible: "
    )


def test_the_seed_decides(tmp_path):
    tiny = MODELS["tiny"]
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        random.write(tiny, path, seed)
    a, b, c = ((path / "model.safetensors").read_bytes() for path in paths)
    assert a == b != c
    assert json.loads((paths[0] / "config.json").read_text())["quantization_config"]


def test_weights_are_uniformly_ternary(tmp_path):
    random.write(MODELS["tiny"].with_variant("b1.58"), tmp_path)
    weights = IntegerWeights(tmp_path)
    codes = np.concatenate([weights[name].ravel() for name in weights if name.endswith(".w")])
    shares = np.bincount(codes + 1, minlength=3) / len(codes)
    # n = 86,000 of chance 1/3: deviation 1.6e-3; five of them
    assert shares == pytest.approx([1 / 3] * 3, abs=5 * (2 / 9 / len(codes)) ** 0.5)


def met_zeros(model: IntegerModel, tokens: torch.Tensor) -> tuple[list[float], list[float]]:
    """Shares of gates <= 0 and of zeros at the down_proj input, a layer each, as the layers run."""
    gates, downs = [], []
    glu, sparse = ops.ternary_glu_matmul, ops.rms_norm_topk_int8
    width = model.config.intermediate_size

    def watched_glu(q, scale, w, w_scale, gate, bits):
        gates.append(float((gate <= 0).float().mean()))
        return glu(q, scale, w, w_scale, gate, bits)

    def watched_sparse(x, gain, eps, k):
        found = sparse(x, gain, eps, k)
        if x.shape[1] == width:
            downs.append(float((found[0] == 0).float().mean()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "ternary_glu_matmul", watched_glu)
        patch.setattr(ops, "rms_norm_topk_int8", watched_sparse)
        model.trunk(*rows_of(tokens), model.empty_caches(3, *tokens.shape), 3)
    return gates, downs


def test_the_zeros_met_are_the_papers(tmp_path):
    """Table 3's 7B row, which the checkpoint is shaped for, on the shape of novels-42m."""
    config = MODELS["novels-42m"].replace(num_hidden_layers=2)
    model = write(tmp_path, config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, config.vocab_size, (4, 64), generator=generator)
    gates, downs = met_zeros(model, tokens)
    assert len(gates) == len(downs) == 2
    assert gates == pytest.approx([0.67] * 2, abs=0.03)
    assert downs == pytest.approx([0.84] * 2, abs=0.05)


def test_without_the_shape_half_of_the_gates_are_open(tmp_path, monkeypatch):
    """What the test above would find of plain random weights: it can fail."""
    config = MODELS["novels-42m"].replace(num_hidden_layers=2)
    monkeypatch.setattr(random, "tilted", lambda packed, *_: packed)
    gates, _ = met_zeros(write(tmp_path, config), torch.arange(2, 130)[None])
    assert gates == pytest.approx([0.5] * 2, abs=0.1)
