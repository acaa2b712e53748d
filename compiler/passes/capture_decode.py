"""CaptureDecode: a decode step becomes one CUDA graph, captured at its first call.

    decode_kv3(tokens, ...)   ->   decode_kv3(tokens, ...):        decode_kv3_step(tokens, ...):
                                       replay a graph of the            memory = decode_kv3_memory()
                                       step for this m                  the kernels

The virtual machine keeps a graph for every m; it holds the addresses that the first call with this
m was given, so the runtime passes the same tensors at every call and changes what is in them.
What the kernels write between them is made once, by `decode_kv3_memory`, and the machine keeps it:
its pool, where it would else lie, gives everything unused back to the system when that is full.
A step of a 2B model is some 300 launches, each of which would take the host 3 us.
"""

import itertools

import tvm
from tvm import relax

from compiler.kernels import in_force
from compiler.passes.record_workspace import storage_size
from schedules.targets import GpuTarget

CAPTURED = ("decode_kv", "decode_one_kv", "decode_token_kv")
RUN_OR_CAPTURE = "vm.builtin.cuda_graph.run_or_capture"
CACHED_ALLOC = "vm.builtin.cuda_graph.get_cached_alloc"


@tvm.transform.module_pass(opt_level=0, name="CaptureDecode")
def capture_decode(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    if not isinstance(in_force().target, GpuTarget):
        return mod
    changed = mod.clone()
    names = [gv.name_hint for gv, func in mod.functions_items() if isinstance(func, relax.Function)]
    for entry, name in enumerate(sorted(name for name in names if name.startswith(CAPTURED))):
        func = mod[name]
        memory, step = (tvm.ir.GlobalVar(f"{name}_{part}") for part in ("memory", "step"))
        changed[memory] = allocate(func, memory)
        relax.expr._update_type(memory, changed[memory].ty)
        relax.expr._update_type(step, func.ty)
        own_symbols = relax.utils.copy_with_new_vars(keep_memory(func, memory, entry))
        changed[step] = own_symbols.with_attr("global_symbol", step.name_hint)
        changed[name] = replay(func, step, name, entry)
    return changed


def planned(func: relax.Function) -> list[relax.VarBinding]:
    """The bindings that make the function's storage, but that of its result."""
    bindings = [binding for block in func.body.blocks for binding in block.bindings]
    return [binding for binding in bindings if storage_size(binding.value) is not None]


def allocate(func: relax.Function, gv: tvm.ir.GlobalVar) -> relax.Function:
    """A function without arguments: a tuple of the storage of `func`."""
    builder = relax.BlockBuilder()
    with builder.function(gv.name_hint, [], pure=False):
        storages = [builder.emit(binding.value) for binding in planned(func)]
        builder.emit_func_output(builder.emit(relax.Tuple(storages)))
    return builder.get()[gv.name_hint]


def keep_memory(func: relax.Function, memory: tvm.ir.GlobalVar, entry: int) -> relax.Function:
    """`func` with the storage that `memory` made at the first call."""
    arguments = relax.Tuple([memory, relax.prim_value(entry)])
    call = relax.op.call_builtin_with_ctx(CACHED_ALLOC, arguments, ty_args=memory.ty.ret)
    kept = relax.Var("memory", memory.ty.ret)
    number = itertools.count()

    def with_kept(binding: relax.Binding) -> relax.Binding:
        if storage_size(binding.value) is None:
            return binding
        return relax.VarBinding(binding.var, relax.TupleGetItem(kept, next(number)))

    blocks = [relax.BindingBlock([relax.VarBinding(kept, call)])]
    for block in func.body.blocks:
        blocks.append(relax.BindingBlock([with_kept(binding) for binding in block.bindings]))
    body = relax.SeqExpr(blocks, func.body.body)
    return relax.Function(func.params, body, func.ret_ty, func.is_pure, func.attrs)


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
