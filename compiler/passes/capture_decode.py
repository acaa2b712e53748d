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

CAPTURED = ("decode_kv", "decode_one_kv")
RUN_OR_CAPTURE = "vm.builtin.cuda_graph.run_or_capture"


@tvm.transform.module_pass(opt_level=0, name="CaptureDecode")
def capture_decode(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    if not isinstance(in_force().target, GpuTarget):
        return mod
    changed = mod.clone()
    names = [gv.name_hint for gv, func in mod.functions_items() if isinstance(func, relax.Function)]
    for entry, name in enumerate(sorted(name for name in names if name.startswith(CAPTURED))):
        func, step = mod[name], tvm.ir.GlobalVar(f"{name}_step")
        relax.expr._update_type(step, func.ty)
        own_symbols = relax.utils.copy_with_new_vars(func)
        changed[step] = own_symbols.with_attr("global_symbol", step.name_hint)
        changed[name] = replay(func, step, name, entry)
    return changed


def replay(func: relax.Function, step: tvm.ir.GlobalVar, name: str, entry: int) -> relax.Function:
    """The function of `func`'s signature that captures `step` under `entry` and replays it."""
    params = [relax.Var(param.name, param.ty) for param in func.params]
    builder = relax.BlockBuilder()
    with builder.function(name, params, attrs=dict(func.attrs), pure=False):
        inputs = builder.emit(relax.Tuple(params))
        rows = relax.ShapeExpr([params[0].ty.shape[0]])
        arguments = relax.Tuple([step, inputs, relax.prim_value(entry), rows])
        call = relax.op.call_builtin_with_ctx(RUN_OR_CAPTURE, arguments, ty_args=func.ret_ty)
        builder.emit_func_output(builder.emit(call))
    return builder.get()[name]
