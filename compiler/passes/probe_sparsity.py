"""ProbeSparsity: for every decode function, one that tells how many activations were zero.

    decode_kv3(...) -> logits    gets beside it    decode_sparsity_kv3(...) -> f32[layers, 2]

The share of zeros that the sparse matmuls of a layer (o_proj, down_proj) met, mean over the rows.
It is read off the counts of `rms_norm_topk_int8`, so that the probed step does a step's own work.
Models of which a layer has not two sparse matmuls (FP4, llama) get no probe.
"""

import numpy as np
import tvm
from tvm import relax

from compiler.ops import find_op
from compiler.ops.rms_norm_topk import rms_norm_topk_int8

PROBED, PROBE = "decode_", "decode_sparsity_"
COUNT = 3  # of the results of rms_norm_topk_int8
SITES = 2  # sparse matmuls a layer


@tvm.transform.module_pass(opt_level=0, name="ProbeSparsity")
def probe_sparsity(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    changed = mod.clone()
    for name, func in mod.functions_items():
        is_probed = name.name_hint.startswith(PROBED)
        if is_probed and len(find_counts(func)) == SITES * count_layers(func):
            probe_name = PROBE + name.name_hint.removeprefix(PROBED)
            changed[probe_name] = probe(func, probe_name)
    return changed


def count_layers(func: relax.Function) -> int:
    (caches,) = (param for param in func.params if param.name == "caches")
    return len(caches.ty.fields) // 2  # codes and scales


def find_counts(func: relax.Function) -> list[tuple[relax.Var, int]]:
    """(count i32[M], columns K) of every call of rms_norm_topk_int8, in order."""
    bindings = [b for block in func.body.blocks for b in block.bindings]
    calls = {}
    for b in bindings:
        if isinstance(b.value, relax.Call) and find_op(b.value) is rms_norm_topk_int8:
            calls[b.var] = int(b.value.args[0].ty.shape[1])
    return [
        (b.var, calls[b.value.tuple_value])
        for b in bindings
        if isinstance(b.value, relax.TupleGetItem)
        and b.value.index == COUNT
        and b.value.tuple_value in calls
    ]


def probe(func: relax.Function, name: str) -> relax.Function:
    func = relax.utils.copy_with_new_vars(func)
    counts, sizes = zip(*find_counts(func), strict=True)
    (block,) = func.body.blocks
    builder = relax.BlockBuilder()
    with builder.function(name, list(func.params)):
        with builder.dataflow():
            for binding in block.bindings:
                builder.emit_normalized(binding)
            stacked = builder.emit(relax.op.stack(list(counts), axis=0))
            mean = builder.emit(relax.op.mean(relax.op.astype(stacked, "float32"), axis=1))
            share = builder.emit(relax.op.divide(mean, relax.const(np.array(sizes, np.float32))))
            zeros = builder.emit(relax.op.subtract(relax.const(np.float32(1)), share))
            shape = (len(counts) // SITES, SITES)
            found = builder.emit_output(relax.op.reshape(zeros, shape))
        builder.emit_func_output(found)
    return builder.get()[name]
