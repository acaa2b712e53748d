"""RecordWorkspace: the sum of the planned storage, where it is of constant size."""

import tvm

from compiler.passes.record_workspace import record_workspace

MODULE = """
m = TypeVar("m")
@I.ir_module
class Module:
    @R.function(pure=False)
    def small(x: R.Tensor((m,), "float32")) -> R.Tensor((m,), "float32"):
        storage = R.memory.alloc_storage(R.shape([100]), 0, "global", "uint8")
        return x
    @R.function(pure=False)
    def prefill(x: R.Tensor((m,), "float32")) -> R.Tensor((m,), "float32"):
        storage = R.memory.alloc_storage(R.shape([5000]), 0, "global", "uint8")
        return x
    @R.function(pure=False)
    def large(x: R.Tensor((m,), "float32")) -> R.Tensor((m,), "float32"):
        storage = R.memory.alloc_storage(R.shape([{size}]), 0, "global", "uint8")
        storage1 = R.memory.alloc_storage(R.shape([20]), 0, "global", "uint8")
        return x
"""


def recorded(size: str) -> tvm.IRModule:
    return record_workspace(tvm.script.from_source(MODULE.replace("{size}", size)))


def test_the_largest_function_and_prompt():
    assert int(recorded("1000").attrs["workspace_bytes"]) == 6020


def test_a_size_of_the_call():
    assert "workspace_bytes" not in (recorded("m").attrs or {})
