"""SpecializeOneRow: beside every decode function, one for a single row, where a target has kernels
that exist for one row only.

    decode_kv3(tokens i64[m], ...)  gets beside it  decode_one_kv3(tokens i64[1], ...)

FuseOneRow then works on those alone; the runtime takes them for steps of one row.
"""

import tvm
from tvm import relax, tirx

from compiler.kernels import families_of, in_force
from compiler.ops.norm_matmul import norm_matmul

MANY, ONE = "decode_kv", "decode_one_kv"


@tvm.transform.module_pass(opt_level=0, name="SpecializeOneRow")
def specialize_one_row(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    if not families_of(norm_matmul.schedules, in_force().target.families):
        return mod
    changed = mod.clone()
    for name, func in mod.functions_items():
        if name.name_hint.startswith(MANY):
            one_name = ONE + name.name_hint.removeprefix(MANY)
            changed[one_name] = bind_rows(func).with_attr("global_symbol", one_name)
    return changed


def bind_rows(func: relax.Function) -> relax.Function:
    rows = func.params[0].ty.shape[0]
    bound = func.bind_symbolic_vars({rows: tirx.IntImm("int64", 1)})
    return relax.utils.copy_with_new_vars(bound)
