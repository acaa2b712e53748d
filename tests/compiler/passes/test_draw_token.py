"""DrawToken: a GPU's steps that bring a token, with and without kernels of one row of their own."""

import pytest
import tvm
from tvm import relax

from compiler import pipeline
from compiler.export import export_model
from compiler.kernels import using
from compiler.passes.draw_token import DRAWN
from model.config import MODELS
from schedules.targets import TARGETS

TINY = MODELS["tiny"]


def lowered(row: str) -> tvm.IRModule:
    spec = TARGETS[row]
    with using(spec), spec.to_tvm():
        return pipeline.lower(export_model(TINY.replace(head_bits=8)), (3,))


NO_KERNELS = ("shape_func", "decode_")  # sizes, and where a step's memory is made


def called(func: relax.Function) -> list[str]:
    """Kernels, in order."""
    values = [binding.value for block in func.body.blocks for binding in block.bindings]
    calls = [value for value in values if isinstance(value, relax.Call)]
    names = [c.op.name_hint for c in calls if isinstance(c.op, tvm.ir.GlobalVar)]
    return [name for name in names if not name.startswith(NO_KERNELS)]


@pytest.mark.parametrize(
    "row, step", [("cuda-sm80", "decode_kv3"), ("cuda-sm90", "decode_one_kv3")]
)
def test_a_request_before_and_a_draw_behind(row, step):
    mod = lowered(row)
    drawn = called(mod[f"{DRAWN}3_step"])
    assert drawn[0] == "request" and drawn[-1] == "sample"
    assert drawn[1:-1] == called(mod[f"{step}_step"])
    request, reply, *_ = mod[f"{DRAWN}3"].params
    assert [str(p.ty.dtype) for p in (request, reply)] == ["int64", "int64"]
    assert [[int(n) for n in p.ty.shape] for p in (request, reply)] == [[8], [1]]


def test_a_cpu_has_none():
    names = [gv.name_hint for gv in lowered("generic").get_global_vars()]
    assert "decode_kv3" in names and not any(name.startswith(DRAWN) for name in names)
