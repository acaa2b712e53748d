"""ReuseTensors: make each tensor of the planned memory once, not once a layer.

    alloc6 = R.memory.alloc_tensor(storage1, 0, R.shape([m, 64]), "int8", 0)     as alloc1 was
    kernel(..., alloc6)                     ->                    kernel(..., alloc1)

StaticPlanBlockMemory gave both the same storage because they never live at the same time, so one
tensor object can serve. It costs the virtual machine 0.9 us a tensor (shape, tensor, release),
and a layer has about 20.
"""

from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

structural_key: Any = tvm_ffi.StructuralKey  # its stub asks for arguments it does not take
ALLOC_TENSOR = tvm.ir.Op.get("relax.memory.alloc_tensor")


@tvm.transform.module_pass(opt_level=0, name="ReuseTensors")
def reuse_tensors(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    changed = mod.clone()
    for name, func in mod.functions_items():
        if isinstance(func, relax.Function):
            changed[name] = _Reuser().visit_expr(func)
    return changed


@mutator
class _Reuser(PyExprMutator):
    def __init__(self) -> None:
        super().__init__()
        self.made: dict[Any, relax.Var] = {}  # the call that made it -> the tensor

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = binding.value
        if isinstance(value, relax.Call) and value.op.same_as(ALLOC_TENSOR):
            first = self.made.setdefault(structural_key(value), binding.var)
            if not first.same_as(binding.var):
                self.set_var_remap(binding.var, first)
                return
        super().visit_var_binding_(binding)
