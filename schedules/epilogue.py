"""Matmul epilogues: what becomes of an exact int32 sum before it is stored, float32 in this order.

    name     | extra tensor       | out[m, n], where s = scale[m] * w_scale[n]
    scale    |                    | acc * s
    glu      | gate f32[M, N]     | (g * g) * (acc * s), g = max(gate, 0)
    residual | residual f32[M, N] | residual + acc * s in float64, rounded once

A kernel is written with a tensor `extra` between `w_scale` and `out`; `finish` removes it from the
parameters where the epilogue has none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc


@dataclass(frozen=True)
class Epilogue:
    extra: str | None  # name of the tensor it reads besides
    value: Callable[..., Expr]  # (float32 acc, s, extra) -> float32, scalars or vectors
    is_gated: bool = False  # out is 0 where extra <= 0: the sum is not needed there

    def finish(self, func: PrimFunc) -> PrimFunc:
        if self.extra:
            return func
        params = [param for param in func.params if param.name != "extra"]
        return PrimFunc(params, func.body, func.ret_type, func.attrs)


def _glu(acc: Expr, scale: Expr, gate: Expr) -> Expr:
    g = T.max(gate, T.float32(0))
    return g * g * (acc * scale)


def _residual(acc: Expr, scale: Expr, residual: Expr) -> Expr:
    """acc * scale is exact in float64, so contracting it into the sum changes nothing."""
    narrow = str(residual.ty.dtype)  # float32, or float32x8
    wide = [T.cast(v, narrow.replace("32", "64", 1)) for v in (acc, scale, residual)]
    return T.cast(wide[2] + wide[0] * wide[1], narrow)


EPILOGUES = {
    "scale": Epilogue(None, lambda acc, scale, _: acc * scale),
    "glu": Epilogue("gate", _glu, is_gated=True),
    "residual": Epilogue("residual", _residual),
}


@dataclass(frozen=True)
class Output:
    """The tensors that an epilogue reads and writes; emits the stores of finished sums."""

    end: Epilogue
    n: int
    scale: Any  # f32[M]
    w_scale: Any  # f32[N]
    extra: Any  # f32[M, N]
    out: Any  # f32[M, N]

    def store(self, m, b, block: int, sums: Callable[[Expr, int], Expr]) -> None:
        """out[m, block * b :][:block], none past N; sums(j, lanes) is int32 from output j on."""
        with T.If(b < self.n // block):
            with T.Then():
                self._store(m, block * b, block, sums)
            with T.Else():
                self._store(m, block * b, self.n % block, sums)

    def _store(self, m, n0, valid: int, sums) -> None:
        with T.serial(valid // 8) as g:
            self._store_vector(m, n0 + 8 * g, T.cast(sums(8 * g, 8), "float32x8"))
        with T.serial(valid % 8) as i:
            j = valid // 8 * 8 + i
            self.store_one(m, n0 + j, sums(j, 1))

    def store_one(self, m, j, acc: Expr) -> None:
        """out[m, j] from its int32 sum"""
        extra = self.extra[m, j] if self.end.extra else None
        y = self.end.value(T.cast(acc, "float32"), self.scale[m] * self.w_scale[j], extra)
        T.buffer_store(self.out, y, [m, j])

    def _store_vector(self, m, j, acc: Expr) -> None:
        at = T.ramp(j, 1, 8)
        extra = self.extra[m, at] if self.end.extra else None
        y = self.end.value(acc, self.scale[m] * self.w_scale[at], extra)
        T.buffer_store(self.out, y, [m, at])

    def store_zeros(self, m, b, block: int) -> None:
        with T.serial(T.min(block, self.n - block * b)) as j:
            T.buffer_store(self.out, T.float32(0), [m, block * b + j])

    def mark_live(self, live, i, m, b, block: int) -> None:
        """live[i] = whether any output of the block needs its sum"""
        if not self.end.is_gated:
            T.buffer_store(live, T.int32(1), [i])
            return
        T.buffer_store(live, T.int32(0), [i])
        with T.serial(T.min(block, self.n - block * b)) as j:
            positive = T.cast(self.extra[m, block * b + j] > T.float32(0), "int32")
            T.buffer_store(live, live[i] | positive, [i])
