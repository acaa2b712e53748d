"""FusePrompts: prompts on Hopper have one call for gate and up, and one for qkv and rope."""

import pytest
from tvm import relax, tirx

from compiler.kernels import using
from compiler.ops import find_op
from compiler.ops.glu_matmul import glu_matmul
from compiler.ops.norm_matmul import LAYOUT
from compiler.ops.ternary_glu_matmul import ternary_glu_matmul
from compiler.ops.ternary_matmul import ternary_matmul
from compiler.passes.fuse_prompts import fuse_prompts
from schedules.targets import TARGETS
from tests.compiler.passes.test_fuse_one_row import HOPPER, kernels, lower


@pytest.fixture(scope="module")
def lowered():
    return lower(HOPPER)


def test_a_prompt_has_one_call(lowered):
    called = kernels(lowered["prefill_kv3"])
    assert called.count("glu_matmul") == 1 and "ternary_glu_matmul" not in called
    assert called.count("rope_matmul") == 1 and not {"rope", "ternary_matmul"} & set(called)


def test_steps_of_few_rows_keep_theirs(lowered):
    called = kernels(lowered["decode_kv3_step"])
    assert called.count("ternary_glu_matmul") == 1 and "glu_matmul" not in called
    assert called.count("rope") == 1 and "rope_matmul" not in called


def test_other_rows_keep_theirs():
    called = kernels(lower("cuda-sm80")["prefill_kv3"])
    assert called.count("ternary_glu_matmul") == 1 and "glu_matmul" not in called
    assert called.count("rope") == 1 and "rope_matmul" not in called


@pytest.mark.parametrize(
    "sizes, has_rope, has_glu",
    [
        ({"head_dim": 48}, False, True),  # no whole heads in a tile
        ({"hidden_size": 72}, False, False),  # rows that cp.async cannot copy
    ],
)
def test_what_the_kernels_cannot_do_stays(sizes, has_rope, has_glu):
    called = kernels(lower(HOPPER, **sizes)["prefill_kv3"])
    assert ("rope_matmul" in called, "rope" in called) == (has_rope, not has_rope)
    assert ("glu_matmul" in called, "ternary_glu_matmul" in called) == (has_glu, not has_glu)


@pytest.mark.parametrize("gate_scale, is_fused", [("scale", True), ("other", False)])
def test_gate_and_up_of_other_scales_stay(gate_scale, is_fused):
    """Of the same codes with another scale of rows the gate is another."""
    n, k, m = 64, 128, tirx.Var("m", "int64")
    packed = LAYOUT.packed_shape(n, k)
    tensors = {
        "q": ("int8", [m, k]),
        "scale": ("float32", [m]),
        "other": ("float32", [m]),
        "gate_w": ("uint8", packed),
        "w": ("uint8", packed),
        "w_scale": ("float32", [n]),
    }
    v = {
        name: relax.Var(name, relax.TensorType(shape, dtype))
        for name, (dtype, shape) in tensors.items()
    }
    builder = relax.BlockBuilder()
    with builder.function("prefill_kv3", list(v.values())):
        with builder.dataflow():
            gate = ternary_matmul(v["q"], v[gate_scale], v["gate_w"], v["w_scale"], 8)
            gate = builder.emit(gate)
            up = ternary_glu_matmul(v["q"], v["scale"], v["w"], v["w_scale"], gate, 8)
            result = builder.emit_output(up)
        builder.emit_func_output(result)
    with using(TARGETS[HOPPER]):
        fused = fuse_prompts(builder.get())["prefill_kv3"]
    values = [binding.value for block in fused.body.blocks for binding in block.bindings]
    assert (glu_matmul in map(find_op, values)) == is_fused
