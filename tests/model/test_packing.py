"""Two-bit weights: the layout by an independent loop and against transformers' own functions."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from model.bitnet import BitNetModel
from model.config import MODELS
from model.packing import pack_ternary, unpack_ternary, write_latent, write_packed
from model.quantizers import int8_absmax, ternary_absmean

EXAMPLES = settings(max_examples=60, deadline=None)
TINY = MODELS["tiny"]
SHAPES = st.tuples(st.integers(1, 23), st.integers(1, 9), st.integers(0, 2**31))


def ternary(out: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (out, columns), generator=generator, dtype=torch.int8)


@EXAMPLES
@given(SHAPES)
def test_unpack_inverts_pack(shape):
    codes = ternary(*shape)
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-shape[0] // 4), shape[1])
    assert torch.equal(unpack_ternary(packed, shape[0]), codes)


@EXAMPLES
@given(SHAPES)
def test_the_layout_is_slabs_along_the_outputs(shape):
    codes = ternary(*shape)
    rows = -(-shape[0] // 4)
    expected = [[0] * shape[1] for _ in range(rows)]
    for n in range(shape[0]):
        for c in range(shape[1]):
            expected[n % rows][c] |= (int(codes[n, c]) + 1) << 2 * (n // rows)
    assert pack_ternary(codes).tolist() == expected


@EXAMPLES
@given(SHAPES)
def test_transformers_packs_the_same_bytes(shape):
    """Any number of outputs, also no multiple of four, where rows past the last stay 0."""
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    codes = ternary(*shape)
    packed = pack_ternary(codes)
    assert torch.equal(pack_weights(codes.clone()), packed)
    with torch.compiler.set_stance("force_eager"):
        theirs = unpack_weights(packed, torch.float32)
    assert torch.equal(theirs[: shape[0]], codes.float())
    assert (theirs[shape[0] :] == -1).all()  # their reader gives the rows past the last too


@pytest.mark.parametrize("bad", [torch.zeros(4, 4), torch.full((4, 4), 2, dtype=torch.int8)])
def test_only_ternary_codes_are_packed(bad):
    with pytest.raises(ValueError, match="want int8"):
        pack_ternary(bad)


def test_code_3_and_wrong_sizes_are_refused():
    packed = pack_ternary(ternary(9, 4, 0))
    for out in (8, 13):
        with pytest.raises(ValueError, match=f"3 rows cannot hold {out} outputs"):
            unpack_ternary(packed, out)
    packed[1, 2] |= 3
    with pytest.raises(ValueError, match="found code 3"):
        unpack_ternary(packed, 9)


def test_code_3_past_the_last_output_is_no_error():
    packed = pack_ternary(ternary(9, 4, 0))  # slabs 0-2, 3-5, 6-8; the last slab holds nothing
    packed[1, 2] |= 3 << 6
    assert torch.equal(unpack_ternary(packed, 9), ternary(9, 4, 0))


@pytest.fixture(scope="module")
def model() -> BitNetModel:
    torch.manual_seed(0)
    return BitNetModel(TINY.replace(tie_word_embeddings=False))


def test_a_packed_file_holds_codes_and_the_scales_that_multiply(model, tmp_path):
    state = model.state_dict()
    size = write_packed(state, model.config, tmp_path)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    codes, scale = ternary_absmean(state[name])
    assert torch.equal(unpack_ternary(tensors[name], 64), codes)
    assert tensors[f"{name}_scale"].tolist() == [scale.item()]
    codes, scale = int8_absmax(state["lm_head.weight"])
    assert torch.equal(tensors["lm_head.weight"], codes)
    assert torch.equal(tensors["lm_head.weight_scale"], scale[:, 0])
    assert torch.equal(tensors["model.norm.weight"], state["model.norm.weight"])
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert quantization == {
        "quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline",
    }  # fmt: skip
    matrices = sum(v.numel() for k, v in state.items() if v.dim() == 2 and ".layers." in k)
    tables = 2 * 512 * 64
    assert matrices / 4 + tables < size < matrices / 4 + tables * 1.2 + 8192  # names and norms


def test_a_latent_file_holds_the_weights_in_the_asked_type(model, tmp_path):
    write_latent(model.state_dict(), model.config, tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(tensors[name], value.bfloat16())


def test_a_float_model_cannot_be_packed(tmp_path):
    with pytest.raises(ValueError, match="variant 'llama' has no ternary weights"):
        write_packed({}, TINY.with_variant("llama"), tmp_path)
