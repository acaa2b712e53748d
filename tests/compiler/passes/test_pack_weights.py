"""PackWeights on a gated pair of matmuls: types, the table of layouts, and what it refuses."""

import pytest
import tvm

from compiler.kernels import Schedule, default_choice, using
from compiler.passes.pack_weights import pack_weights
from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS

NAMES = ["norm", "gate.w", "gate.scale", "up.w", "up.scale"]


def module(gate_w: str, up_w: str, attrs: str) -> tvm.IRModule:
    """Gate and up projections of weights of these types."""
    return tvm.script.from_source(f"""
m = TypeVar("m")
@I.ir_module
class Module:
    I.module_attrs({attrs})
    @R.function
    def decode(x: R.Tensor((m, 48), "float32"), params: R.Tuple(
        R.Tensor((48,), "float32"), {gate_w}, R.Tensor((64,), "float32"), {up_w},
        R.Tensor((64,), "float32"))) -> R.Tensor((m, 64), "float32"):
        with R.dataflow():
            norm = params[0]
            gate_w = params[1]
            gate_scale = params[2]
            up_w = params[3]
            up_scale = params[4]
            quantized = R.bitnet.rms_norm_int4(x, norm, 1e-5)
            q = quantized[0]
            scale = quantized[1]
            gate = R.bitnet.ternary_matmul(q, scale, gate_w, gate_scale, 4)
            y = R.bitnet.ternary_glu_matmul(q, scale, up_w, up_scale, gate, 4)
            R.output(y)
        return y
""")


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_parameters_get_the_layout_of_the_kernel(target):
    names = f'{{"param_names": {NAMES}}}'.replace("'", '"')
    unpacked = 'R.Tensor((64, 48), "int8")'
    with using(target):
        after = pack_weights(module(unpacked, unpacked, names))
    kernels = Schedule("ternary_matmul", default_choice("ternary_matmul", target.families))
    layouts = {"gate.w": kernels.layout(4), "up.w": kernels.layout(4, "glu")}
    assert dict(after.attrs["layouts"]) == layouts
    packed = [f'R.Tensor({LAYOUTS[v].packed_shape(64, 48)}, "uint8")' for v in layouts.values()]
    table = str(layouts).replace("'", '"')
    tvm.ir.assert_structural_equal(after, module(*packed, f'{{"layouts": {table}, {names[1:]}'))


def test_weight_that_is_no_parameter_is_refused():
    script = """
m = TypeVar("m")
@I.ir_module
class Module:
    I.module_attrs({"param_names": []})
    @R.function
    def decode(q: R.Tensor((m, 48), "int8"), scale: R.Tensor((m,), "float32"),
               w: R.Tensor((64, 48), "int8"), w_scale: R.Tensor((64,), "float32"),
               params: R.Tuple()) -> R.Tensor((m, 64), "float32"):
        with R.dataflow():
            y = R.bitnet.ternary_matmul(q, scale, w, w_scale, 4)
            R.output(y)
        return y
"""
    with pytest.raises(ValueError, match="ternary_matmul: w is not a parameter"):
        pack_weights(tvm.script.from_source(script))
