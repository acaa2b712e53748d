"""CaptureDecode and BoundRows: what they make of a GPU's steps; a CPU's stay as they are."""

import pytest
import tvm
from tvm import relax

from compiler.kernels import using
from compiler.passes.bound_rows import bound_rows
from compiler.passes.capture_decode import CACHED_ALLOC, RUN_OR_CAPTURE, capture_decode
from compiler.passes.record_workspace import is_storage
from schedules.targets import TARGETS

MODULE = """
m = TypeVar("m")
@I.ir_module
class Module:
    @R.function(pure=False)
    def decode_kv3(tokens: R.Tensor((m,), "int64"), caches: R.Tuple(R.Tensor((4,), "float32"))
                   ) -> R.Tensor((m,), "int64"):
        storage = R.memory.alloc_storage(R.shape([2048]), 0, "global", "uint8")
        x = R.memory.alloc_tensor(storage, 0, R.shape([m]), "int64")
        y = R.add(tokens, x)
        return y
    @R.function
    def prefill_kv3(tokens: R.Tensor((m,), "int64")) -> R.Tensor((m,), "int64"):
        y = R.add(tokens, tokens)
        return y
"""


@pytest.fixture
def module() -> tvm.IRModule:
    return tvm.script.from_source(MODULE)


def test_decode_replays_a_graph_of_its_step(module):
    with using(TARGETS["cuda-sm90"]):
        after = capture_decode(module)
    names = sorted(gv.name_hint for gv in after.get_global_vars())
    assert names == ["decode_kv3", "decode_kv3_memory", "decode_kv3_step", "prefill_kv3"]
    inputs, call = (binding.value for binding in after["decode_kv3"].body.blocks[0].bindings)
    builtin, arguments = call.args
    assert builtin.global_symbol == RUN_OR_CAPTURE
    step, _, entry, key = arguments.fields
    assert step.name_hint == "decode_kv3_step" and int(entry) == 0
    assert len(inputs.fields) == 2
    assert key.values[0].same_as(after["decode_kv3"].params[0].ty.shape[0])
    relax.analysis.well_formed(after)  # raises if it is not
    tvm.ir.assert_structural_equal(after["prefill_kv3"], module["prefill_kv3"])


def test_a_step_keeps_its_memory(module):
    """What a graph writes to is not the pool's, which may give it back to the system."""
    with using(TARGETS["cuda-sm90"]):
        after = capture_decode(module)
    values = {name: bound(after[f"decode_kv3_{name}"]) for name in ("memory", "step")}
    assert [is_storage(value) for value in values["memory"]] == [True, False]
    kept, storage, *_ = values["step"]
    assert kept.args[0].global_symbol == CACHED_ALLOC
    assert kept.args[1].fields[0].name_hint == "decode_kv3_memory"
    assert isinstance(storage, relax.TupleGetItem) and storage.index == 0
    assert not any(map(is_storage, values["step"]))


def bound(func: relax.Function) -> list[relax.Expr]:
    return [binding.value for block in func.body.blocks for binding in block.bindings]


def test_rows_are_bounded(module):
    with using(TARGETS["cuda-sm90"]):
        after = bound_rows(module)
    target = TARGETS["cuda-sm90"]
    rows = {"decode_kv3": target.step_rows, "prefill_kv3": target.prompt_rows}
    for name, func in after.functions_items():
        assert int(func.attrs["tir_var_upper_bound"]["m"]) == rows[name.name_hint]


@pytest.mark.parametrize("module_pass", [bound_rows, capture_decode])
def test_cpu_is_left_alone(module, module_pass):
    with using(TARGETS["generic"]):
        tvm.ir.assert_structural_equal(module_pass(module), module)
