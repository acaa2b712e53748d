"""The configuration: its rows, its file, what transformers writes, and what it refuses."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import MODELS, ConfigError, ModelConfig

TINY = MODELS["tiny"]
EXAMPLES = settings(max_examples=100, deadline=None)


def written(directory, config=TINY, **changes) -> dict:
    """config.json of `config` with some values changed, as an object."""
    config.save(directory)
    return json.loads((directory / "config.json").read_text()) | changes


def refusal(values: dict) -> str:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(values)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", ["a4.8", "b1.58", "llama"])
def test_saved_and_loaded_is_the_same(tmp_path, name, variant):
    config = MODELS[name].with_variant(variant)
    config.save(tmp_path, "offline" if config.is_ternary else None)
    assert ModelConfig.load(tmp_path) == config == ModelConfig.load(tmp_path / "config.json")


# Weights of the layers as the papers count them (SPEC: 2.084 B for 2B-4T; the names of the rest).
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("bitnet-a4.8-700m", 0.729), ("bitnet-a4.8-1.3b", 1.27), ("bitnet-a4.8-3b", 3.32),
        ("bitnet-a4.8-7b", 6.61), ("bitnet-b1.58-2b-4t", 2.41), ("novels-42m", 0.0419),
    ],
)  # fmt: skip
def test_rows_have_the_size_of_their_name(name, billions):
    assert MODELS[name].num_parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_2b_4t_is_the_published_shape():
    config = MODELS["bitnet-b1.58-2b-4t"]
    assert (config.head_dim, config.kv_size, config.attention_size) == (128, 640, 2560)
    layers = config.num_parameters - config.vocab_size * config.hidden_size
    assert layers / 1e9 == pytest.approx(2.084, abs=5e-4)


def test_the_shipped_row_is_the_shipped_file():
    assert MODELS["novels-42m"].max_position_embeddings == 1024
    from model.checkpoint import find

    assert ModelConfig.load(find("novels-42m")) == MODELS["novels-42m"]


def test_topk_is_half_of_the_o_proj_input_rounded_down():
    assert TINY.topk == 32
    assert TINY.replace(topk_fraction=0.51).topk == 32
    assert TINY.replace(topk_fraction=1e-9).topk == 1


def test_only_a48_quantises_the_cache():
    assert TINY.with_variant("b1.58").kv_bits == 16
    assert MODELS["bitnet-b1.58-2b-4t"].with_variant("a4.8").kv_bits == 3
    assert TINY.replace(kv_bits=4).with_variant("a4.8").kv_bits == 4


def test_what_transformers_writes_is_read(tmp_path):
    from transformers import BitNetConfig, LlamaConfig

    shape: dict[str, Any] = dict(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, bos_token_id=3, eos_token_id=4,
        max_position_embeddings=77,
    )  # fmt: skip
    BitNetConfig(**shape, rms_norm_eps=3e-5).save_pretrained(tmp_path / "named")
    read = ModelConfig.load(tmp_path / "named")
    assert read == ModelConfig(
        name="named", variant="b1.58", rope_theta=500000.0, rms_norm_eps=3e-5, head_dim=8,
        tie_word_embeddings=False, **shape,
    )  # fmt: skip
    rope = {"rope_theta": 1234.0, "rope_type": "default"}
    LlamaConfig(**shape, rope_parameters=rope, head_dim=16).save_pretrained(tmp_path)
    read = ModelConfig.load(tmp_path)
    assert (read.variant, read.head_dim, read.rope_theta, read.rms_norm_eps) == (
        "llama", 16, 1234.0, 1e-6,
    )  # fmt: skip


def test_left_out_fields_take_transformers_defaults():
    """An older file has rope_theta at the top, or nothing; the defaults differ by model type."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    least = {name: getattr(TINY, name) for name in names} | {"num_attention_heads": 4}
    bitnet = ModelConfig.from_dict(least | {"model_type": "bitnet", "head_dim": None})
    assert (bitnet.rope_theta, bitnet.tie_word_embeddings) == (500000.0, False)
    assert (bitnet.num_key_value_heads, bitnet.head_dim, bitnet.variant) == (4, 16, "b1.58")
    llama = ModelConfig.from_dict(
        least | {"model_type": "llama", "rope_theta": 7, "num_key_value_heads": None}
    )
    assert (llama.rope_theta, llama.rms_norm_eps, llama.num_key_value_heads) == (7.0, 1e-6, 4)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"variant": "b1"}, "variant 'b1' is unknown; has ['a4.8', 'b1.58', 'llama']"),
        ({"variant": "llama"}, "variant 'llama' is unknown for model_type 'bitnet'"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' is unknown; has ['bitnet', 'llama']"),
        ({"model_type": None}, "model_type None is unknown"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is unknown"),
        ({"activation_format": "fp8"}, "activation_format 'fp8' is unknown"),
        ({"kv_bits": 2}, "kv_bits 2 is unknown; has [16, 4, 3]"),
        ({"intermediate_size": 2**17}, "intermediate_size is 131072; possible: below 131072"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is unknown"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is unknown"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be an object"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be an integer, found '64'"),
        ({"hidden_size": 64.0}, "hidden_size must be an integer, found 64.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, found 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer, found True"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple"),
        ({"head_dim": 6}, "head_dim must be a multiple of 4, found 6"),
        ({"head_dim": None, "hidden_size": 66}, "hidden_size 66 is not a multiple of"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number, found nan"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be > 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, found 'no'"),
        ({"topk_fraction": 1.5}, "topk_fraction must be in (0, 1], found 1.5"),
        ({"bos_token_id": 512}, "bos_token_id must be below vocab_size 512, found 512"),
        ({"eos_token_id": [1, 2]}, "eos_token_id must be an integer, found [1, 2]"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(tmp_path, changes, found):
    assert found in refusal(written(tmp_path, **changes))


@EXAMPLES
@given(
    st.sampled_from([field.name for field in dataclasses.fields(ModelConfig)]),
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=2), st.none()),
)  # fmt: skip
def test_any_json_in_any_field_is_a_config_or_one_line(field, value):
    values = dataclasses.asdict(TINY) | {"model_type": "bitnet", field: value}
    try:
        ModelConfig.from_dict(values)
    except ConfigError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", '"x"'])
def test_a_file_that_is_no_object_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"not JSON|must hold a JSON object") as error:
        ModelConfig.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        ModelConfig.load(tmp_path / "config.json")


def test_an_unknown_quantization_mode_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"quantization_mode 'half' is unknown"):
        TINY.save(tmp_path, "half")


def test_a_config_that_cannot_be_used_is_named_by_its_file(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ConfigError, match=f"model_type None is unknown.*{tmp_path}/config.json"):
        ModelConfig.load(tmp_path)
