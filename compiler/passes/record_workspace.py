"""RecordWorkspace: the bytes that a step's planned tensors take, as the module's attribute.

Of each kind of step (`prefill`, `decode`, `decode_one`, ...) the function that takes most: an
engine runs those of one cache. The pool keeps a prompt's, a captured graph its own (CaptureDecode).
Where all storage is of constant size (BoundRows), none elsewhere.
"""

import tvm
from tvm import relax, tirx

ATTR = "workspace_bytes"
ALLOC_STORAGE = tvm.ir.Op.get("relax.memory.alloc_storage")


@tvm.transform.module_pass(opt_level=0, name="RecordWorkspace")
def record_workspace(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    most: dict[str, int] = {}
    for name, func in mod.functions_items():
        if isinstance(func, relax.Function):
            size = storage_bytes(func)
            if size is None:
                return mod
            kind, _, _ = name.name_hint.partition("_kv")
            most[kind] = max(most.get(kind, 0), size)
    return mod.with_attr(ATTR, sum(most.values()))


def storage_bytes(func: relax.Function) -> int | None:
    """The sum over the function; None where a size depends on the call."""
    total = 0
    for block in func.body.blocks:
        for binding in block.bindings:
            if is_storage(binding.value):
                size = storage_size(binding.value)
                if size is None:
                    return None
                total += size
    return total


def is_storage(value: relax.Expr) -> bool:
    return isinstance(value, relax.Call) and value.op.same_as(ALLOC_STORAGE)


def storage_size(value: relax.Expr) -> int | None:
    """Bytes of storage that is made there, of the same size at every call; else None."""
    if not is_storage(value):
        return None
    (size,) = value.args[0].values
    return int(size) if isinstance(size, tirx.IntImm) else None
