"""ReuseTensors: one tensor for each storage, shape and dtype."""

import tvm

from compiler.passes.reuse_tensors import reuse_tensors


def module(body: str) -> tvm.IRModule:
    lines = "".join(f"        {line}\n" for line in body.strip().splitlines())
    return tvm.script.from_source(f"""
m = TypeVar("m")
@I.ir_module
class Module:
    @R.function(pure=False)
    def main(x: R.Tensor((m, 8), "float32")) -> R.Tensor((m, 8), "float32"):
{lines}        return z
""")


def alloc(tensor: str, storage: str, dtype: str) -> str:
    return (
        f'{tensor}: R.Tensor((m, 8), "{dtype}") = R.memory.alloc_tensor('
        f'{storage}, 0, R.shape([m, 8]), R.dtype("{dtype}"), 0)\n'
    )


STORAGES = "".join(
    f's{i}: R.Any = R.memory.alloc_storage(R.shape([32 * m]), 0, R.str("global"), '
    'R.dtype("float32"))\n'
    for i in range(2)
)


def run(tensor: str) -> str:
    return f'_ = R.call_packed("kernel", x, {tensor}, ty_args=(R.Tuple()))\n'


def test_same_storage_shape_and_dtype_are_one_tensor():
    before = STORAGES + alloc("a", "s0", "float32") + run("a") + alloc("z", "s0", "float32")
    after = STORAGES + alloc("z", "s0", "float32") + run("z")
    tvm.ir.assert_structural_equal(
        reuse_tensors(module(before + run("z"))), module(after + run("z"))
    )


def test_other_storage_or_dtype_is_another_tensor():
    body = (
        STORAGES
        + alloc("a", "s0", "float32")
        + alloc("b", "s1", "float32")
        + alloc("c", "s1", "int32")
        + run("a")
        + run("b")
        + run("c")
        + alloc("z", "s1", "float32").replace("z:", "z:")
    )
    after = reuse_tensors(module(body))
    script = after.script()
    assert script.count("alloc_tensor") == 3  # z is b
