"""DropUnreadLists: no list of non-zero columns where the matmul multiplies all of them.

    rms_norm_topk_int8 -> sparse_ternary_matmul     rms_norm_mask_int8 -> ternary_residual_matmul
    the same, k = K                                 rms_norm_int8 -> ternary_residual_matmul

Where the weights were packed for a dense kernel (Hopper's). A norm whose counts something else
reads, ProbeSparsity's, keeps its list. Functions for one row are FuseOneRow's.
"""

from collections.abc import Callable

import tvm
from tvm import relax
from tvm.relax.transform import DeadCodeElimination

from compiler.kernels import in_force
from compiler.ops import find_op
from compiler.ops.rms_norm import rms_norm_int8
from compiler.ops.rms_norm_mask import rms_norm_mask_int8
from compiler.ops.rms_norm_topk import rms_norm_topk_int8
from compiler.ops.sparse_ternary_matmul import sparse_ternary_matmul
from compiler.ops.ternary_residual_matmul import ternary_residual_matmul
from compiler.passes.specialize_one_row import ONE
from compiler.rebuild import rebuild
from compiler.signature import same_shape
from schedules.layouts import LAYOUTS
from schedules.targets import GpuTarget

LAYOUT = LAYOUTS["tiles_2bit"]
LISTS = 2  # of the results of rms_norm_topk_int8, the first that is one


@tvm.transform.module_pass(opt_level=0, name="DropUnreadLists")
def drop_unread_lists(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    if not isinstance(in_force().target, GpuTarget):
        return mod
    dense = rewrite(mod, lambda func: rebuild(func, {}, multiply_all))
    return rewrite(DeadCodeElimination()(dense), drop_lists)


def rewrite(mod: tvm.IRModule, change: Callable[[relax.Function], relax.Function]) -> tvm.IRModule:
    changed = mod.clone()
    for name, func in mod.functions_items():
        if isinstance(func, relax.Function) and not name.name_hint.startswith(ONE):
            changed[name] = change(func)
    return changed


def multiply_all(call: relax.Call) -> relax.Call:
    if find_op(call) is not sparse_ternary_matmul:
        return call
    q, scale, _, _, w, w_scale, residual = call.args
    n, k = int(w_scale.ty.shape[0]), int(q.ty.shape[1])
    if not same_shape(w.ty.shape, LAYOUT.packed_shape(n, k)):
        return call
    return ternary_residual_matmul(q, scale, w, w_scale, residual)


def drop_lists(func: relax.Function) -> relax.Function:
    bindings = [b for block in func.body.blocks for b in block.bindings]
    fields = [b.value for b in bindings if isinstance(b.value, relax.TupleGetItem)]
    listed = {field.tuple_value for field in fields if field.index >= LISTS}
    unlisted = [b.value for b in bindings if b.var not in listed]

    def drop(call: relax.Call) -> relax.Call:
        if find_op(call) is not rms_norm_topk_int8 or not any(map(call.same_as, unlisted)):
            return call
        x, gain, eps, k = call.args
        if int(k.value) == int(x.ty.shape[1]):
            return rms_norm_int8(x, gain, eps)
        return rms_norm_mask_int8(x, gain, eps, k)

    return rebuild(func, {}, drop)
