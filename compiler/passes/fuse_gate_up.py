"""FuseGateUp: in functions of prompts, gate and up projection become one call.

    ternary_matmul(gate) -> ternary_glu_matmul(up)               glu_matmul

Where the target has its kernel and both weights lie as it reads them. The call before is left to
DeadCodeElimination. Steps of few rows keep theirs, which are for them.
"""

import tvm
from tvm import relax

from compiler.kernels import families_of, find_module, in_force
from compiler.ops import find_op
from compiler.ops.glu_matmul import glu_matmul
from compiler.ops.norm_matmul import LAYOUT
from compiler.ops.ternary_glu_matmul import ternary_glu_matmul
from compiler.ops.ternary_matmul import ternary_matmul
from compiler.passes.bound_rows import PROMPT
from compiler.rebuild import rebuild
from compiler.signature import same_shape


@tvm.transform.module_pass(opt_level=0, name="FuseGateUp")
def fuse_gate_up(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    families = families_of(glu_matmul.schedules, in_force().target.families)
    if not families:
        return mod
    is_possible = find_module(glu_matmul.schedules, families[0]).is_possible
    changed = mod.clone()
    for name, func in mod.functions_items():
        if name.name_hint.startswith(PROMPT):
            changed[name] = fuse(func, is_possible)
    return changed


def fuse(func: relax.Function, is_possible) -> relax.Function:
    values = {b.var: b.value for block in func.body.blocks for b in block.bindings}

    def one_call(call: relax.Call) -> relax.Call:
        if find_op(call) is not ternary_glu_matmul:
            return call
        q, scale, w, w_scale, gate, _ = call.args
        before = values.get(gate)
        if not isinstance(before, relax.Call) or find_op(before) is not ternary_matmul:
            return call
        gate_q, _, gate_w, gate_scale, _ = before.args
        n, k = int(w_scale.ty.shape[0]), int(q.ty.shape[1])
        shape = LAYOUT.packed_shape(n, k)
        tiled = all(same_shape(weight.ty.shape, shape) for weight in (w, gate_w))
        if not (gate_q.same_as(q) and tiled and is_possible(k)):
            return call
        return glu_matmul(q, scale, gate_w, gate_scale, w, w_scale)

    return rebuild(func, {}, one_call)
