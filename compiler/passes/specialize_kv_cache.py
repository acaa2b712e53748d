"""SpecializeKVCache: one copy of every function for each width of the KV cache.

    prefill, decode at EXPORT_KV_BITS  ->  prefill_kv16, prefill_kv4, prefill_kv3, decode_kv16, ...

A copy differs in the static argument `kv_bits` of its dialect calls and in the type of `caches`,
where the symbol t stands for the positions that have scales.
"""

from collections.abc import Sequence

import tvm
from tvm import relax, tirx

from compiler.ops import find_op
from compiler.ops.heads import code_dtype
from compiler.rebuild import rebuild


def specialize_kv_cache(kv_bits: Sequence[int]) -> tvm.transform.Pass:
    @tvm.transform.module_pass(opt_level=0, name="SpecializeKVCache")
    def run(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
        copies = {
            f"{name.name_hint}_kv{bits}": specialize(func, bits)
            for name, func in mod.functions_items()
            for bits in kv_bits
        }
        named = {name: func.with_attr("global_symbol", name) for name, func in copies.items()}
        return tvm.IRModule(named, attrs=mod.attrs)

    return run


def specialize(func: relax.Function, kv_bits: int) -> relax.Function:
    (caches,) = (param for param in func.params if param.name == "caches")
    fields = list(caches.ty.fields)
    positions = 1 if kv_bits == 16 else tirx.Var("t", "int64")
    for i in range(0, len(fields), 2):
        codes, scales = fields[i : i + 2]
        *slots_heads_parts, _ = scales.shape
        fields[i] = relax.TensorType(codes.shape, code_dtype(kv_bits))
        fields[i + 1] = relax.TensorType([*slots_heads_parts, positions], scales.dtype)

    def set_kv_bits(call: relax.Call) -> relax.Call:
        op = find_op(call)
        if op is None or "kv_bits" not in op.statics:
            return call
        args = list(call.args)
        args[op.argument_names.index("kv_bits")] = relax.prim_value(kv_bits)
        return relax.Call(call.op, args)

    return rebuild(func, {"caches": relax.TupleType(fields)}, set_kv_bits)
