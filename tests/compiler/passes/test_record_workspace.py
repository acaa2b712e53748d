"""RecordWorkspace: the planned storage of each kind of step, where it is of constant size."""

import tvm

from compiler.passes.record_workspace import record_workspace

MODULE = """
m = TypeVar("m")
@I.ir_module
class Module:
    @R.function(pure=False)
    def decode_kv3(x: R.Tensor((m,), "float32")) -> R.Tensor((m,), "float32"):
        storage = R.memory.alloc_storage(R.shape([100]), 0, "global", "uint8")
        return x
    @R.function(pure=False)
    def prefill_kv3(x: R.Tensor((m,), "float32")) -> R.Tensor((m,), "float32"):
        storage = R.memory.alloc_storage(R.shape([5000]), 0, "global", "uint8")
        return x
    @R.function(pure=False)
    def decode_kv16(x: R.Tensor((m,), "float32")) -> R.Tensor((m,), "float32"):
        storage = R.memory.alloc_storage(R.shape([{size}]), 0, "global", "uint8")
        storage1 = R.memory.alloc_storage(R.shape([20]), 0, "global", "uint8")
        return x
"""


def recorded(size: str) -> tvm.IRModule:
    return record_workspace(tvm.script.from_source(MODULE.replace("{size}", size)))


def test_the_largest_of_each_kind():
    assert int(recorded("1000").attrs["workspace_bytes"]) == 5000 + 1000 + 20


def test_a_size_of_the_call():
    assert "workspace_bytes" not in (recorded("m").attrs or {})
