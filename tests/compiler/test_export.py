"""The exported module: names, types, one dialect call for each torch op, no weights."""

import pytest
import tvm
from compiled_model import VARIANTS, exported
from tvm import relax

from compiler.export import export_model, parameters
from compiler.ops import find_op
from model.config import MODELS


def calls(func: relax.Function) -> list[str]:
    """Names of the operators called, in order; stock ones in parentheses."""
    names = []
    for binding in func.body.blocks[0].bindings:
        if isinstance(binding.value, relax.Call):
            op = find_op(binding.value)
            names.append(op.name if op else f"({binding.value.op.name})")
    return names


LAYERS = {
    "a4.8-int4": [
        *("rms_norm_int4", "ternary_matmul", "rope", "kv_append", "attention"),
        *("rms_norm_topk_int8", "sparse_ternary_matmul"),
        *("rms_norm_int4", "ternary_matmul", "ternary_glu_matmul"),
        *("rms_norm_topk_int8", "sparse_ternary_matmul"),
    ],
    "a4.8-fp4": [
        *("rms_norm_fp4", "ternary_matmul", "rope", "kv_append", "attention"),
        *("rms_norm_fp4", "ternary_matmul", "(relax.add)"),
        *("rms_norm_fp4", "ternary_matmul", "ternary_glu_matmul"),
        *("rms_norm_topk_int8", "sparse_ternary_matmul"),
    ],
    "llama": [
        *("rms_norm", "float_matmul", "rope", "kv_append", "attention"),
        *("float_matmul", "(relax.add)", "rms_norm", "float_matmul", "(relax.nn.silu)"),
        *("float_matmul", "(relax.multiply)", "float_matmul", "(relax.add)"),
    ],
}


@pytest.mark.parametrize("variant", LAYERS)
def test_one_call_for_each_op(variant):
    module = exported(VARIANTS[variant])
    prefill, decode = calls(module["prefill"]), calls(module["decode"])
    assert [name for name in prefill if name != "(relax.take)"] == [
        name for name in decode if name != "(relax.take)"
    ]
    first = decode.index(LAYERS[variant][0])
    count = VARIANTS[variant].num_hidden_layers
    assert decode[first:-2] == LAYERS[variant] * count
    assert prefill[-3] == "(relax.take)"


def test_signature():
    config = VARIANTS["a4.8-int4"]
    module = exported(VARIANTS["a4.8-int4"])
    prefill, decode = module["prefill"], module["decode"]
    names = ["tokens", "slots", "positions", "caches", "params"]
    assert [param.name for param in decode.params] == names
    assert [param.name for param in prefill.params] == [*names[:3], "rows", *names[3:]]
    assert str(prefill.ret_ty.shape) == f"R.shape([r, {config.vocab_size}])"
    assert str(decode.ret_ty.shape) == f"R.shape([m, {config.vocab_size}])"
    assert len(decode.params[-2].ty.fields) == 2 * config.num_hidden_layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(variant):
    module, tensors = exported(VARIANTS[variant]), parameters(VARIANTS[variant])
    assert list(map(str, module.attrs["param_names"])) == list(tensors)
    for field, tensor in zip(module["decode"].params[-1].ty.fields, tensors.values(), strict=True):
        assert tuple(map(int, field.shape)) == tuple(tensor.shape)
        assert f"torch.{field.dtype}" == str(tensor.dtype)


def test_script_round_trip():
    module = exported(VARIANTS["a4.8-int4"])
    parsed = tvm.script.from_source(module.script(show_meta=False))
    tvm.ir.assert_structural_equal(parsed, module)


def test_large_model_needs_no_weights():
    config = MODELS["bitnet-b1.58-2b-4t"].replace(num_hidden_layers=1)
    tensors = parameters(config)
    assert all(tensor.is_meta for tensor in tensors.values())
    table = export_model(config)["decode"].params[-1].ty.fields[0]
    assert tuple(map(int, table.shape)) == (128256, 2560)
