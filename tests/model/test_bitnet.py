"""The training model: causal in both stages, each variant as documented, transformers' names."""

from typing import cast

import pytest
import torch
import torch.nn.functional as F
from tiny_models import TINY, VARIANTS, random_tokens, training_model

from model import bitnet
from model.bitnet import BitNetModel, Layer
from model.quantizers import fake_int4, fake_int8, fake_topk_int8

STAGED = [
    (name, stage)
    for name in VARIANTS
    for stage in (("a8", "hybrid") if "a4.8" in name else ("a8",))
]


@pytest.mark.parametrize(("name", "stage"), STAGED)
@pytest.mark.parametrize("changed", [1, 5, 9])
def test_a_token_changes_no_earlier_logits(name, stage, changed):
    """TopK, a mean or a maximum over more than one token would show here."""
    model = training_model(VARIANTS[name])
    tokens = random_tokens(TINY, 2, 10)
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 7) % TINY.vocab_size
    with torch.no_grad():
        before, after = model(tokens, stage), model(other, stage)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0, :changed], after[0, :changed])
    assert not torch.isclose(before[0, changed:], after[0, changed:]).all(-1).any()


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_and_loss(name):
    model = training_model(VARIANTS[name])
    tokens = random_tokens(TINY, 2, 6)
    logits = model(tokens)
    assert logits.shape == (2, 6, 512) and logits.dtype == torch.float32
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert torch.equal(model.loss(tokens, tokens), expected)


@pytest.mark.parametrize(("name", "stage"), STAGED)
def test_every_parameter_gets_a_gradient(name, stage):
    model = training_model(VARIANTS[name])
    tokens = random_tokens(TINY, 2, 6)
    model.loss(tokens, tokens.roll(-1, 1), stage).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


def quantizer_inputs(
    model: BitNetModel, stage: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(input, output) of the quantizer in front of each linear of layer 0."""
    layer = cast(Layer, model.model.layers[0])
    seen: dict[str, tuple] = {}
    for site, module in {
        "qkv": layer.self_attn.in_quant, "o": layer.self_attn.out_quant,
        "gate_up": layer.mlp.in_quant, "down": layer.mlp.out_quant,
    }.items():  # fmt: skip
        module.register_forward_hook(
            lambda _, given, made, site=site: seen.update({site: (given[0], made)})
        )
    with torch.no_grad():
        model(random_tokens(TINY, 1, 5), stage)
    return seen


def test_the_hybrid_stage_has_the_papers_quantizers():
    seen = quantizer_inputs(training_model(TINY), "hybrid")
    wanted = {
        "qkv": fake_int4, "gate_up": fake_int4, "down": fake_int8,
        "o": lambda x: fake_topk_int8(x, 32),
    }  # fmt: skip
    for site, quantize in wanted.items():
        given, made = seen[site]
        assert torch.equal(made, quantize(given)), site
    assert (seen["o"][1] != 0).sum(-1).max() <= 32


def test_the_first_stage_and_b158_are_int8_everywhere_and_llama_has_none():
    for name, quantize in (("a4.8-int4", fake_int8), ("b1.58", fake_int8), ("llama", lambda x: x)):
        for site, (given, made) in quantizer_inputs(training_model(VARIANTS[name]), "a8").items():
            assert torch.equal(made, quantize(given)), (name, site)


def test_stages_differ_for_a48_alone():
    tokens = random_tokens(TINY, 1, 5)
    for name, differs in (("a4.8-int4", True), ("a4.8-fp4", True), ("llama", False)):
        with torch.no_grad():
            model = training_model(VARIANTS[name])
            assert torch.equal(model(tokens, "a8"), model(tokens, "hybrid")) != differs


def test_the_unit_is_squared_relu_or_silu():
    gate, up = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([2.0, 2.0, -1.0])
    assert bitnet.GatedUnit(True)(gate, up).tolist() == [0.0, 0.5, -9.0]
    assert torch.equal(bitnet.GatedUnit(False)(gate, up), F.silu(gate) * up)


def test_the_norm_is_rms_and_keeps_zeros():
    norm = bitnet.RMSNorm(4, eps=0.0)
    norm.weight.data[:] = torch.tensor([1.0, 2.0, 1.0, 1.0])
    assert norm(torch.tensor([[0.0, 2.0, 0.0, 0.0]])).tolist() == [[0.0, 4.0, 0.0, 0.0]]


def test_kv_levels_keep_the_bos_position_at_4_bits():
    assert bitnet.kv_levels(3, 3, torch.device("cpu")).flatten().tolist() == [7.0, 3.0, 3.0]
    assert bitnet.kv_levels(3, 4, torch.device("cpu")).flatten().tolist() == [7.0, 7.0, 7.0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["a4.8-int4", "llama"])
def test_parameters_are_named_and_shaped_as_transformers(name, tied):
    from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM

    config = VARIANTS[name].replace(tie_word_embeddings=tied)
    kinds = {"a4.8": (BitNetConfig, BitNetForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    make_config, make_model = kinds[config.variant]
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    shape = {field: getattr(config, field) for field in fields}
    theirs = make_model(
        make_config(
            **shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
            bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    ours = BitNetModel(config)
    shapes = [{k: tuple(v.shape) for k, v in m.named_parameters()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("length", "stage", "found"),
    [(5, "a9", r"stage 'a9' is unknown; has \['a8', 'hybrid'\]"), (257, "a8", "the model has 256")],
)
def test_a_wrong_call_is_one_line(length, stage, found):
    with pytest.raises(ValueError, match=found) as error:
        training_model(TINY)(random_tokens(TINY, 1, length), stage)
    assert "\n" not in str(error.value)
