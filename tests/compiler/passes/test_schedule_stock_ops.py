"""ScheduleStockOps on what TVM makes of silu(x) * y: one loop, vectors that divide K."""

import pytest
import tvm
from tvm.relax import transform

from compiler.kernels import using
from compiler.passes.schedule_stock_ops import schedule_stock_ops
from schedules.targets import TARGETS

FUSE = (
    transform.LegalizeOps(),
    transform.AnnotateTIROpPattern(),
    transform.FuseOps(),
    transform.FuseTIR(),
)


def scheduled(columns: int) -> str:
    mod = tvm.script.from_source(f"""
m = TypeVar("m")
@I.ir_module
class Module:
    @R.function
    def main(x: R.Tensor((m, {columns}), "float32"), y: R.Tensor((m, {columns}), "float32")):
        with R.dataflow():
            z = R.multiply(R.nn.silu(x), y)
            R.output(z)
        return z
""")
    with using(TARGETS["generic"]):
        mod = schedule_stock_ops(tvm.transform.Sequential(FUSE)(mod))
    (function,) = (f for _, f in mod.functions_items() if isinstance(f, tvm.tirx.PrimFunc))
    return function.script()


@pytest.mark.parametrize("columns, width", [(64, 4), (66, 2), (65, 1)])
def test_one_vectorised_loop(columns, width):
    script = scheduled(columns)
    assert script.count("T.sblock(") - script.count("# with T.sblock(") == 1
    assert (f"in T.vectorized(T.int64({width}))" in script) == (width > 1)
