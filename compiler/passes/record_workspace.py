"""RecordWorkspace: the bytes that a step's planned tensors take, as the module's attribute.

Of the function that takes most, where all storage is of constant size (BoundRows); none elsewhere.
"""

import tvm
from tvm import relax, tirx

ATTR = "workspace_bytes"
ALLOC_STORAGE = tvm.ir.Op.get("relax.memory.alloc_storage")


@tvm.transform.module_pass(opt_level=0, name="RecordWorkspace")
def record_workspace(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    funcs = [func for _, func in mod.functions_items() if isinstance(func, relax.Function)]
    sizes = [size for func in funcs if (size := storage_bytes(func)) is not None]
    return mod.with_attr(ATTR, max(sizes)) if len(sizes) == len(funcs) else mod


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
