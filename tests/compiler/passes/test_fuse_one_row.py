"""SpecializeOneRow, FuseOneRow and LaunchEarly: a step of one row on Hopper; others stay."""

import re
from functools import cache

import pytest
import tvm

from compiler import pipeline
from compiler.export import export_model
from compiler.kernels import using
from compiler.passes.launch_early import EARLY, LAUNCH_PARAMS, launch_early
from schedules.kv_append.cuda import kernel as append
from schedules.targets import TARGETS
from tests.compiler.compiled_model import TINY

HOPPER = "cuda-sm90"
STEP = "decode_one_kv3_step"
# Heads that rope_attention can turn
TURNING = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


@cache
def lower(target: str, **changes) -> tvm.IRModule:
    model = TINY.replace(num_hidden_layers=1, **TURNING).replace(**changes)
    with using(TARGETS[target]), TARGETS[target].to_tvm():
        return pipeline.lower(export_model(model), (16, 3))


def kernels(func) -> list[str]:
    """Of a function, in order, without the numbers that TVM gives to equal names."""
    return [
        name.rstrip("0123456789")
        for name in re.findall(r"^    (\w+)\(", func.script(), re.MULTILINE)
    ]


def test_a_row_takes_five_launches_a_layer():
    lowered = lower(HOPPER)
    assert [k for k in kernels(lowered[STEP]) if "shape_func" not in k] == [
        "embedding",
        "norm_matmul",
        "rope_attention",
        "norm_residual_matmul",
        "norm_glu_matmul",
        "norm_residual_matmul",
        "rms_norm_int",
        "int8_matmul",
    ]


def test_a_cache_of_16_bits_and_many_rows_keep_their_attention():
    lowered = lower(HOPPER)
    for name in ("decode_one_kv16_step", "decode_kv3_step"):
        assert {"rope", "kv_append", "attention"} <= set(kernels(lowered[name]))
    assert "norm_matmul" not in kernels(lowered["decode_kv3_step"])


def test_the_output_projection_takes_its_norm():
    """With half of the row, as a4.8 has it, and with all of it: no list is made."""
    for variant in ("a4.8", "b1.58"):
        called = kernels(lower(HOPPER, variant=variant)[STEP])
        assert called.count("norm_residual_matmul") == 2 and "rms_norm_topk_int" not in called


@pytest.mark.parametrize("target", ["generic", "cuda-sm80"])
def test_other_targets_have_no_such_function(target):
    names = [gv.name_hint for gv in lower(target).get_global_vars()]
    assert not [name for name in names if "one" in name or name.startswith("norm_")]


def test_every_launch_waits():
    func = append(4, 2, 64, 3, TARGETS[HOPPER])
    module = tvm.IRModule({"kernel": func})
    with using(TARGETS[HOPPER]):
        waiting = launch_early(module)["kernel"]
    assert list(waiting.attrs[LAUNCH_PARAMS]) == [EARLY]
    assert waiting.script().count("griddepcontrol") == 1
    with using(TARGETS["cuda-sm80"]):
        tvm.ir.assert_structural_equal(launch_early(module), module)
