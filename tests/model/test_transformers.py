"""The oracle: transformers' BitNet reads the same files and gives the same hidden states.

A small random model is written by `save_pretrained`, or packed by transformers' `pack_weights`,
read by transformers (`from_pretrained`, its BitLinear or AutoBitLinear) and by `model.checkpoint`.
Both run in float32; our keys and values are float16, so theirs are rounded too. Both round the same
INT8 codes but where one stands within float32's error of a half, so sequences agree to 1e-4 or,
after a flip, to a few per cent (test_integer.py argues it). The head's INT8 input is ours alone, so
the last norm's output is compared.
"""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_integer import FLIP, LENGTH, SEQUENCES, agree
from tiny_models import integer_hidden, random_tokens, relative_error
from transformers import BitNetConfig, BitNetForCausalLM
from transformers.integrations.bitnet import pack_weights
from transformers.models.bitnet import modeling_bitnet
from transformers.quantizers import quantizer_bitnet

from model import quantizers
from model.checkpoint import IntegerWeights, load_integer_model
from model.evaluate import with_int8_embedding

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """No torch.compile, no gradient, no demand for accelerate; keys and values through float16."""
    attend = modeling_bitnet.eager_attention_forward

    def half_attention(module, query, key, value, *arguments, **options):
        halves = key.half().float(), value.half().float()
        return attend(module, query, *halves, *arguments, **options)

    monkeypatch.setattr(quantizer_bitnet, "is_accelerate_available", lambda: True)
    monkeypatch.setattr(modeling_bitnet, "eager_attention_forward", half_attention)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


def quantization(linear_class: str, mode: str) -> dict:
    return {
        "quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": mode,
    }  # fmt: skip


def random_model(tied: bool, linear_class: str, mode: str) -> BitNetForCausalLM:
    """transformers' own model: uneven gains, outputs of about one, an embedding INT8 can hold."""
    torch.manual_seed(3)
    config = BitNetConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
        max_position_embeddings=64, rms_norm_eps=2e-5, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    model = BitNetForCausalLM(config)
    config.quantization_config = quantization(linear_class, mode)
    for name, value in model.named_parameters():
        if value.dim() == 1:
            value.copy_(1 + 0.3 * torch.randn_like(value))
        else:
            value.copy_(torch.randn_like(value) * (value.shape[1] ** -0.5 if "proj" in name else 1))
    table = {"model.embed_tokens.weight": model.model.embed_tokens.weight.clone()}
    model.model.embed_tokens.weight.copy_(with_int8_embedding(table).popitem()[1])
    return model


def pack_file(directory, is_inverse: bool) -> None:
    """Quantise the saved file as Microsoft's is: U8 slabs and one scale a matrix."""
    tensors = load_file(directory / WEIGHTS)
    for name in [name for name in tensors if "proj" in name]:
        scale = tensors[name].abs().mean()
        codes = (tensors[name] / scale).round().clamp(-1, 1)
        tensors[name] = pack_weights(codes)
        stored = 1 / scale if is_inverse else scale
        tensors[f"{name}_scale"] = stored.reshape(1)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def write(directory, linear_class: str, mode: str, tied: bool = True) -> None:
    random_model(tied, linear_class, mode).save_pretrained(directory)
    if mode == "offline":
        pack_file(directory, is_inverse=linear_class == "bitlinear")


def their_hidden(directory, tokens: torch.Tensor) -> torch.Tensor:
    model = BitNetForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.model(tokens).last_hidden_state


def both_hidden(directory) -> tuple[torch.Tensor, torch.Tensor]:
    model = load_integer_model(directory)
    tokens = random_tokens(model.config, SEQUENCES, LENGTH)
    return integer_hidden(model, tokens, 16), their_hidden(directory, tokens)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("linear_class", "mode"),
    [("autobitlinear", "online"), ("autobitlinear", "offline"), ("bitlinear", "offline")],
)
def test_our_integers_agree_with_transformers(tmp_path, linear_class, mode, tied):
    write(tmp_path, linear_class, mode, tied)
    ours, theirs = both_hidden(tmp_path)
    assert agree(ours, theirs)


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_the_scale_taken_the_other_way_does_not_agree(tmp_path, linear_class):
    """The trap: the file of one class under the name of the other."""
    write(tmp_path, linear_class, "offline")
    ours, _ = both_hidden(tmp_path)
    other = {"autobitlinear": "bitlinear", "bitlinear": "autobitlinear"}[linear_class]
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace(linear_class, other))
    wrong, theirs = both_hidden(tmp_path)
    assert agree(wrong, theirs)  # both read the name
    assert relative_error(wrong, ours).median() > FLIP


def test_without_a_class_the_scale_divides_as_transformers_default(tmp_path):
    write(tmp_path, "bitlinear", "offline")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"linear_class": "bitlinear",', ""))
    assert "linear_class" not in (tmp_path / "config.json").read_text()
    ours, theirs = both_hidden(tmp_path)
    assert agree(ours, theirs)


def test_an_offline_model_saved_after_transformers_unpacked_it_is_read(tmp_path):
    """AutoBitLinear keeps floats of -1, 0, 1 and the scale; their mean is not the scale.

    transformers 5 refuses to save such a model; its earlier versions wrote this state dict.
    """
    write(tmp_path / "packed", "autobitlinear", "offline")
    model = BitNetForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    shutil.copytree(tmp_path / "packed", tmp_path / "saved")
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    assert tensors["model.layers.0.mlp.up_proj.weight"].is_floating_point()
    save_file(tensors, tmp_path / "saved" / WEIGHTS, metadata={"format": "pt"})
    packed, saved = (IntegerWeights(tmp_path / folder) for folder in ("packed", "saved"))
    for parameter in packed:
        assert (packed[parameter] == saved[parameter]).all(), parameter
    assert agree(*both_hidden(tmp_path / "saved"))


def test_an_online_file_gives_the_weights_of_its_packed_twin(tmp_path):
    write(tmp_path / "online", "autobitlinear", "online")
    write(tmp_path / "offline", "autobitlinear", "offline")
    online, offline = (IntegerWeights(tmp_path / folder) for folder in ("online", "offline"))
    for name in online:
        if name.endswith(".scale"):  # means in float64 and in float32
            assert online[name] == pytest.approx(offline[name], rel=1e-6)
        else:
            assert (online[name] == offline[name]).all(), name


def test_their_logits_are_ours_but_for_the_heads_int8_input(tmp_path):
    """Of their hidden states, so that the head alone is compared: half a step an input at most."""
    write(tmp_path, "autobitlinear", "online")
    theirs = BitNetForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_integer_model(tmp_path)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    h = theirs.model.norm(x)
    table = theirs.model.embed_tokens.weight
    bound = h.abs().amax(-1, keepdim=True) / 254 * table.abs().sum(-1) + 1e-4
    error = (ours.logits(x) - theirs.lm_head(h)).abs()
    assert (error <= bound).all()
    assert torch.equal(quantizers.int8_absmax(table)[0], ours.embed.table)
