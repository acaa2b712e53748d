"""Reading checkpoints: every form a file may have, and one line for every way it may be broken."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, VARIANTS, training_model

from model import checkpoint, quantizers
from model.checkpoint import CheckpointError, IntegerWeights, find, load_integer_model
from model.config import ModelConfig
from model.integer import IntegerModel
from model.packing import pack_ternary, write_latent, write_packed

WEIGHTS = "model.safetensors"
DOWN = "model.layers.1.mlp.down_proj.weight"
# The outputs of gate and up, 90, are no multiple of four.
ODD = TINY.replace(hidden_size=60, intermediate_size=90, num_attention_heads=5, head_dim=12,
                   num_key_value_heads=5, tie_word_embeddings=False)  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed tiny model that no test may change."""
    directory = tmp_path_factory.mktemp("packed")
    write_packed(training_model(TINY).state_dict(), TINY, directory)
    return directory


@pytest.fixture
def own(packed, tmp_path):
    """A copy to damage."""
    return shutil.copytree(packed, tmp_path / "own")


def change(directory, **tensors) -> None:
    """Replace tensors of the file, or drop those given as None."""
    name = DOWN
    kept = load_file(directory / WEIGHTS) | {
        key.replace("DOWN", name): v for key, v in tensors.items()
    }
    save_file({k: v for k, v in kept.items() if v is not None}, directory / WEIGHTS)


def change_config(directory, **values) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(directory) -> str:
    """The message of reading all of it: one line, naming the directory."""
    with pytest.raises(CheckpointError) as error:
        for value in IntegerWeights(directory).values():
            assert value is not None
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_packed_weights_are_the_quantised_ones(tmp_path, config):
    state = training_model(config).state_dict()
    write_packed(state, config, tmp_path)
    weights = IntegerWeights(tmp_path)
    for i in range(config.num_hidden_layers):
        for parameter, parts in checkpoint._LINEARS.items():
            matrices = [state[f"model.layers.{i}.{part}.weight"] for part in parts]
            quantized = [quantizers.ternary_absmean(matrix) for matrix in matrices]
            codes = torch.cat([codes for codes, _ in quantized])
            scale = torch.cat([scale.expand(len(codes)) for codes, scale in quantized])
            assert np.array_equal(weights[f"layers.{i}.{parameter}.w"], codes)
            assert np.array_equal(weights[f"layers.{i}.{parameter}.scale"], scale)
        for parameter, source in checkpoint._NORMS.items():
            gain = state[f"model.layers.{i}.{source}.weight"]
            assert np.array_equal(weights[f"layers.{i}.{parameter}"], gain)
    for head, source in (("embed", "model.embed_tokens"), ("head", "lm_head")):
        if f"{head}.table" in weights:
            codes, scale = quantizers.int8_absmax(state[f"{source}.weight"])
            assert np.array_equal(weights[f"{head}.table"], codes)
            assert np.array_equal(weights[f"{head}.scale"], scale[:, 0])
    assert ("head.table" in weights) != config.tie_word_embeddings


@pytest.mark.parametrize("config", [TINY, ODD], ids=["tiny", "odd"])
def test_latent_weights_are_quantised_to_the_packed_ones(tmp_path, config):
    state = training_model(config).state_dict()
    write_packed(state, config, tmp_path / "packed")
    write_latent(state, config, tmp_path / "latent", torch.float32)
    packed, latent = (IntegerWeights(tmp_path / kind) for kind in ("packed", "latent"))
    for name in packed:
        assert np.array_equal(packed[name], latent[name]), name


def test_llama_weights_are_float16(tmp_path):
    config = VARIANTS["llama"]
    state = training_model(config).state_dict()
    write_latent(state, config, tmp_path, torch.float32)
    weights = IntegerWeights(tmp_path)
    name = "model.layers.0.self_attn.{}_proj.weight"
    qkv = torch.cat([state[name.format(part)] for part in "qkv"]).half()
    assert np.array_equal(weights["layers.0.qkv.w"], qkv)
    assert np.array_equal(weights["embed.table"], state["model.embed_tokens.weight"].half())
    assert "layers.0.qkv.scale" not in weights and "layers.0.ffn_sub_norm" not in weights


@pytest.mark.parametrize("name", VARIANTS)
def test_names_shapes_and_types_are_the_models(tmp_path, name):
    config = VARIANTS[name]
    write = write_packed if config.is_ternary else write_latent
    arguments = () if config.is_ternary else (torch.bfloat16,)
    write(training_model(config).state_dict(), config, tmp_path, *arguments)
    weights, model = IntegerWeights(tmp_path), IntegerModel(config)
    assert list(weights) == [name for name, _ in model.named_buffers()]
    assert len(weights) == len(list(model.buffers()))
    for name, buffer in load_integer_model(tmp_path).named_buffers():
        assert torch.equal(buffer, torch.from_numpy(weights[name]))
        assert weights[name].shape == tuple(buffer.shape)
    with pytest.raises(KeyError):
        weights["layers.9.qkv.w"]


def test_a_float_embedding_beside_packed_weights_is_quantised(own, packed):
    tensors = load_file(own / WEIGHTS)
    name = "model.embed_tokens.weight"
    table = tensors[name] * tensors[f"{name}_scale"][:, None]
    change(own, **{name: table, f"{name}_scale": None})
    ours, theirs = IntegerWeights(own), IntegerWeights(packed)
    assert np.array_equal(ours["embed.table"], theirs["embed.table"])
    assert ours["embed.scale"] == pytest.approx(theirs["embed.scale"], rel=1e-6)


def shard(directory) -> list[str]:
    """Split the file in two, as transformers does with an index.json."""
    tensors = load_file(directory / WEIGHTS)
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for file in names:
        save_file({k: tensors[k] for k in tensors if where[k] == file}, directory / file)
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": where}))
    (directory / WEIGHTS).unlink()
    return names


def test_shards_are_read_as_one(own, packed):
    shard(own)
    ours, theirs = IntegerWeights(own), IntegerWeights(packed)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_a_missing_shard_is_refused(own):
    names = shard(own)
    (own / names[1]).unlink()
    assert f"no {names[1]} beside config.json" in refusal(own)


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}',
              '{"weight_map": {"a": 5}}', '{"weight_map": {"a": []}}'],
)  # fmt: skip
def test_a_damaged_index_is_refused(own, index):
    (own / f"{WEIGHTS}.index.json").write_text(index)
    assert "no index of shards" in refusal(own)


def test_a_missing_file_is_refused(own):
    (own / WEIGHTS).unlink()
    assert f"no {WEIGHTS} beside config.json" in refusal(own)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(own, kept):
    content = (own / WEIGHTS).read_bytes()
    kept = int(len(content) * kept) if isinstance(kept, float) else kept
    (own / WEIGHTS).write_bytes(content[:kept])
    assert "truncated or not safetensors" in refusal(own)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.embed_tokens.weight_scale", DOWN, f"{DOWN}_scale",
             "model.layers.0.self_attn.attn_sub_norm.weight"],
)  # fmt: skip
def test_a_missing_tensor_is_named(own, name):
    change(own, **{name: None})
    assert f"tensor {name} is missing" in refusal(own)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"DOWN": torch.zeros(15, 160, dtype=torch.uint8)}, "15 rows cannot hold 64 outputs"),
        ({"DOWN": torch.zeros(16, 159, dtype=torch.uint8)}, "is (64, 159), config.json asks for"),
        ({"DOWN": torch.zeros(16, dtype=torch.uint8)}, "layers.1.down.w"),
        ({"DOWN": torch.full((16, 160), 3, dtype=torch.uint8)}, "found code 3"),
        ({"DOWN": torch.ones(64, 160) / 2}, "neither packed nor of -1, 0, 1"),
        ({"DOWN_scale": torch.ones(2)}, "layers.1.down.scale"),
        ({"DOWN_scale": torch.tensor([float("nan")])}, "layers.1.down.scale holds NaN"),
        ({"model.norm.weight": torch.ones(63)}, "norm is (63,), config.json asks for (64,)"),
        ({"model.norm.weight": torch.full((64,), float("inf"))}, "norm holds NaN or infinity"),
        ({"model.embed_tokens.weight": torch.zeros(511, 64, dtype=torch.int8)}, "embed.table is"),
        ({"model.embed_tokens.weight": torch.full((512, 64), float("nan"))}, "embed.table"),
    ],
)
def test_a_wrong_tensor_is_refused(own, changes, found):
    change(own, **changes)
    assert found in refusal(own)


def test_a_zero_scale_that_divides_is_refused(own):
    change_config(own, quantization_config={"linear_class": "bitlinear"})
    change(own, DOWN_scale=torch.zeros(1))
    assert "layers.1.down.scale holds NaN or infinity" in refusal(own)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"quantization_config": 3}, "quantization_config must be an object"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq' is unknown"),
        ({"quantization_config": {"linear_class": "linear"}}, "linear_class 'linear' is unknown"),
        ({"quantization_config": {"use_rms_norm": True}}, "use_rms_norm True is unknown"),
        ({"quantization_config": {"modules_to_not_convert": ["o_proj"]}}, "modules_to_not"),
        ({"hidden_size": 68, "head_dim": 16}, "config.json asks for"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"kv_bits": 5}, "kv_bits 5 is unknown"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(own, changes, found):
    change_config(own, **changes)
    assert found in refusal(own)


def test_a_llama_of_ternary_weights_is_refused(tmp_path):
    config = VARIANTS["llama"]
    write_latent(training_model(config).state_dict(), config, tmp_path, torch.float16)
    change_config(tmp_path, quantization_config={"quant_method": "bitnet"})
    assert "quant_method 'bitnet' is unknown for variant 'llama'" in refusal(tmp_path)


def test_a_missing_config_is_refused(tmp_path):
    assert "cannot read" in refusal(tmp_path / "nowhere")


def test_models_are_found_by_name_and_by_path(own):
    assert find(str(own)) == own
    assert find("novels-42m") == checkpoint.ZOO / "novels-42m"
    with pytest.raises(
        CheckpointError, match=r"model: asked for 'novels-43m'; possible: "
    ) as error:
        find("novels-43m")
    assert "novels-42m" in str(error.value) and "\n" not in str(error.value)


def test_packed_bytes_past_the_last_output_do_not_matter(tmp_path):
    write_packed(training_model(ODD).state_dict(), ODD, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"  # 90 outputs in 23 rows: the last slab has 21
    before = IntegerWeights(tmp_path)["layers.0.up.w"]
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[name][21:] |= 0b11 << 6
    save_file(tensors, tmp_path / WEIGHTS)
    assert np.array_equal(IntegerWeights(tmp_path)["layers.0.up.w"], before)
    assert before.shape == (90, 60) and pack_ternary(torch.from_numpy(before)).shape == (23, 60)


def test_what_is_read_is_what_the_config_says(own):
    assert IntegerWeights(own).config == ModelConfig.load(own) == TINY
