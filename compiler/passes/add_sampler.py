"""AddSampler: on a GPU, a function that draws tokens where the logits are.

    sample(logits f32[m, V], temperature f32[m], top_k i32[m], top_p f32[m], uniform f64[m])
        -> tokens i64[m]

What it computes: schedules/sample/. A step then brings a token to the host, and not V logits that
the host would search for some milliseconds. A CPU samples with runtime/sampler.py.
"""

import tvm
from tvm import relax, tirx

from compiler.kernels import in_force
from schedules.sample.cuda import kernel
from schedules.targets import GpuTarget

NAME, KERNEL = "sample", "sample_rows"
INPUTS = {"temperature": "float32", "top_k": "int32", "top_p": "float32", "uniform": "float64"}


@tvm.transform.module_pass(opt_level=0, name="AddSampler")
def add_sampler(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    target = in_force().target
    if not isinstance(target, GpuTarget):
        return mod
    vocab = vocabulary(mod)
    rows, builder = tirx.Var("m", "int64"), relax.BlockBuilder(mod)
    func = kernel(vocab, target).with_attrs({"op_pattern": 8, "global_symbol": KERNEL})
    gv = builder.add_func(func, KERNEL)
    params = [
        relax.Var("logits", relax.TensorType([rows, vocab], "float32")),
        *(relax.Var(name, relax.TensorType([rows], dtype)) for name, dtype in INPUTS.items()),
    ]
    with builder.function(NAME, params):
        with builder.dataflow():
            call = relax.call_tir(gv, params, relax.TensorType([rows], "int64"))
            tokens = builder.emit_output(call)
        builder.emit_func_output(tokens)
    return builder.finalize()


def vocabulary(mod: tvm.IRModule) -> int:
    """V: the last axis of what the functions return."""
    func = next(func for _, func in mod.functions_items() if isinstance(func, relax.Function))
    return int(func.ret_ty.shape[1])
