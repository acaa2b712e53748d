"""DropChecks on what VMShapeLower makes of a function with two tuples."""

import tvm
from tvm.relax import transform

from compiler.passes.drop_checks import drop_checks

SCRIPT = """
m = TypeVar("m")
s = TypeVar("s")
@I.ir_module
class Module:
    @R.function(pure=False)
    def main(x: R.Tensor((m, 8), "float32"),
             caches: R.Tuple(R.Tensor((s, 2), "uint8"), R.Tensor((s, 2), "uint8")),
             params: R.Tuple(R.Tensor((8,), "float32"), R.Tensor((8,), "float32"))):
        used = params[1]
        pair = x, used
        R.call_packed("kernel", x, used, ty_args=(R.Tuple()))
        return x
"""


def checks(mod: tvm.IRModule) -> list[str]:
    """`check subject` for every check left, in order."""
    lines = [line.strip() for line in mod.script().splitlines()]
    calls = [line.split('"vm.builtin.')[1] for line in lines if '"vm.builtin.' in line]
    return [f"{call.split(chr(34))[0]} {call.split(', ')[1].split(',')[0]}" for call in calls]


def test_checks_of_fields_go_and_bindings_of_symbols_stay():
    lowered = transform.VMShapeLower()(tvm.script.from_source(SCRIPT))
    after = drop_checks(lowered)
    assert len(checks(lowered)) == 13
    assert checks(after) == [
        "alloc_shape_heap (2",
        "check_tensor_info x",
        "check_tuple_info caches",
        "check_tuple_info params",
        "match_shape x",
        "match_shape gv",  # the first cache: binds s
    ]


def test_unused_reads_and_tuples_go():
    after = drop_checks(transform.VMShapeLower()(tvm.script.from_source(SCRIPT))).script()
    assert "params[0]" not in after
    assert "params[1]" in after
    assert "caches[1]" not in after
    assert "x, used\n" not in after
