"""CaptureDecode: a decode step becomes one CUDA graph, captured at its first call.

    decode_kv3(tokens, ...)   ->   decode_kv3(tokens, ...):        decode_kv3_step(tokens, ...):
                                       replay a graph of the            the kernels
                                       step for this m

The virtual machine keeps a graph for every m; it holds the addresses that the first call with this
m was given, so the runtime passes the same tensors at every call and changes what is in them.
A step of a 2B model is some 300 launches, each of which would take the host 3 us.
"""

import tvm
from tvm import relax

from compiler.kernels import in_force
from schedules.targets import GpuTarget

CAPTURED = "decode_kv"
RUN_OR_CAPTURE = "vm.builtin.cuda_graph.run_or_capture"


@tvm.transform.module_pass(opt_level=0, name="CaptureDecode")
def capture_decode(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    if not isinstance(in_force().target, GpuTarget):
        return mod
    changed = mod.clone()
    names = [gv.name_hint for gv, func in mod.functions_items() if isinstance(func, relax.Function)]
    for entry, name in enumerate(sorted(name for name in names if name.startswith(CAPTURED))):
        step = f"{name}_step"
        func = mod[name]
        changed[step] = func.with_attr("global_symbol", step)
        changed[name] = replay(func, changed.get_global_var(step), name, entry)
    return changed


def replay(func: relax.Function, step: tvm.ir.GlobalVar, name: str, entry: int) -> relax.Function:
    """The function of `func`'s signature that captures `step` under `entry` and replays it."""
    params = [relax.Var(param.name_hint, param.ty) for param in func.params]
    builder = relax.BlockBuilder()
    with builder.function(name, params, attrs=dict(func.attrs), private=False):
        graph = relax.op.call_builtin_with_ctx(
            RUN_OR_CAPTURE,
            [
                step,
                relax.Tuple(params),
                relax.prim_value(entry),
                relax.ShapeExpr([params[0].ty.shape[0]]),
            ],
            ty_args=func.ret_ty,
        )
        builder.emit_func_output(builder.emit(graph))
    return builder.get()[name]
