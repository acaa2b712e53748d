"""rebuild: copy a function with other parameter types; the types inside are inferred anew."""

from collections.abc import Callable, Mapping

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator


@mutator
class _Rebuilder(PyExprMutator):
    def __init__(self, rewrite_call: Callable[[relax.Call], relax.Call]) -> None:
        super().__init__()
        self.rewrite_call = rewrite_call

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        return super().visit_call_(self.rewrite_call(call))


def rebuild(
    func: relax.Function,
    param_types: Mapping[str, tvm.ir.Type],
    rewrite_call: Callable[[relax.Call], relax.Call] = lambda call: call,
) -> relax.Function:
    """`param_types` by parameter name; `rewrite_call` sees a call before its arguments change."""
    rebuilder = _Rebuilder(rewrite_call)
    params = []
    for old in func.params:
        new = relax.Var(old.name, param_types.get(old.name, old.ty))
        rebuilder.set_var_remap(old, new)
        params.append(new)
    body = rebuilder.visit_expr(func.body)
    rebuilt = relax.Function(params, body, None, func.is_pure, func.attrs)
    return relax.utils.copy_with_new_vars(rebuilt)  # no variable is shared by two functions
