"""Matmul epilogues: what becomes of an exact int32 sum before it is stored, in float32 and in this order.

    name     | extra tensor      | out[m, n], where scale is scale[m] * w_scale[n]
    scale    |                   | acc * scale
    glu      | gate f32[M, N]    | (g * g) * (acc * scale), g = max(gate, 0)
    residual | residual f32[M, N]| residual + acc * scale; the sum alone may be contracted

A kernel is written with the tensor `extra` between `w_scale` and `out`; `finish` removes it from
the parameters of a kernel whose epilogue has none.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.ir import Expr
from tvm.tirx import PrimFunc


@dataclass(frozen=True)
class Epilogue:
    extra: str | None  # name of the tensor it reads besides
    value: Callable[[Expr, Expr, Expr], Expr]  # (float acc, scale, extra), scalars or vectors
    zero_if_not_positive: bool = (
        False  # out is 0 wherever extra <= 0, so the sum is not needed there
    )

    def finish(self, func: PrimFunc) -> PrimFunc:
        if self.extra:
            return func
        params = [param for param in func.params if param.name != "extra"]
        return PrimFunc(params, func.body, func.ret_type, func.attrs)


def _glu(acc: Expr, scale: Expr, gate: Expr) -> Expr:
    g = T.max(gate, T.float32(0))
    return g * g * (acc * scale)


EPILOGUES = {
    "scale": Epilogue(None, lambda acc, scale, _: acc * scale),
    "glu": Epilogue("gate", _glu, zero_if_not_positive=True),
    "residual": Epilogue("residual", lambda acc, scale, residual: residual + acc * scale),
}
