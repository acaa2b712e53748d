"""RecordWorkspace: the bytes that a step's planned tensors take, as the module's attribute.

Of the prompt's function that takes most and of the other one, as their sizes differ and the pool
keeps both; where all storage is of constant size (BoundRows), none elsewhere.
"""

import tvm
from tvm import relax, tirx

from compiler.passes.bound_rows import PROMPT

ATTR = "workspace_bytes"
ALLOC_STORAGE = tvm.ir.Op.get("relax.memory.alloc_storage")


@tvm.transform.module_pass(opt_level=0, name="RecordWorkspace")
def record_workspace(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    most = {True: 0, False: 0}
    for name, func in mod.functions_items():
        if isinstance(func, relax.Function):
            size = storage_bytes(func)
            if size is None:
                return mod
            is_prompt = name.name_hint.startswith(PROMPT)
            most[is_prompt] = max(most[is_prompt], size)
    return mod.with_attr(ATTR, sum(most.values()))


def storage_bytes(func: relax.Function) -> int | None:
    """The sum over the function; None where a size depends on the call."""
    total = 0
    for block in func.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and value.op.same_as(ALLOC_STORAGE):
                (size,) = value.args[0].values
                if not isinstance(size, tirx.IntImm):
                    return None
                total += int(size)
    return total
