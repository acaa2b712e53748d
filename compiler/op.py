"""OpDef: everything the compiler knows about one operator, in one record.

Constructing a record registers `relax.bitnet.<name>` (type inference, legalisation, purity) and
lets TVMScript print and parse it as `R.bitnet.<name>(...)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import tvm
import tvm.relax.script.parser as relax_parser
from tvm import relax, tirx
from tvm.ir import Op, _ffi_api
from tvm.tirx import PrimFunc

from compiler.kernels import KernelTable, Make, Schedule, Sizes, in_force
from compiler.signature import Match, TensorArg, same_shape, show_shape, show_type
from schedules.layouts import LAYOUTS, Layout
from schedules.targets import TargetSpec

Statics = Mapping[str, int | float]
# (schedule, size of a letter, static arguments, target) -> the kernel
KernelFactory = Callable[[Schedule, Callable[[str], int], Statics, TargetSpec], PrimFunc]

ROWS = "M"  # the letter of signatures
NEW = -1  # in `OpDef.inplace`: a result that overwrites nothing

relax_parser.bitnet = SimpleNamespace()  # what `R.bitnet` means to the parser of TVMScript


def no_check(match: Match, statics: Statics) -> None:
    """Most operators are fully described by their signature."""


@dataclass(frozen=True)
class OpDef:
    name: str
    tensors: tuple[TensorArg, ...]
    results: tuple[TensorArg, ...]  # one, or the fields of a tuple
    schedules: str  # the folder of schedules/ that holds a module for every family
    kernel: KernelFactory
    statics: Mapping[str, type | tuple[int, ...]] = field(default_factory=dict)
    weight: str | None = None  # the ternary argument i8[N, K] that PackWeights packs
    layout: Callable[[Schedule, Statics], str] | None = None  # which one the kernel reads
    inplace: tuple[int, ...] = ()  # the tensor argument that each result overwrites, or NEW
    check: Callable[[Match, Statics], None] = no_check  # what letters cannot say

    def __post_init__(self) -> None:
        full_name = f"relax.bitnet.{self.name}"
        _ffi_api.RegisterOp(full_name, self.name)
        attrs = {"FInferType": self.infer_type, "FLegalize": self.legalize, "FPurity": True}
        for key, value in attrs.items():
            Op.get(full_name).set_attr(key, value)
        setattr(relax_parser.bitnet, self.name, self)

    def __call__(self, *args: relax.Expr | int | float) -> relax.Call:
        values = [relax.prim_value(a) if isinstance(a, int | float) else a for a in args]
        return relax.Call(Op.get(f"relax.bitnet.{self.name}"), values)

    @property
    def argument_names(self) -> list[str]:
        return [*(arg.name for arg in self.tensors), *self.statics]

    def infer_type(self, call: relax.Call, _: relax.BlockBuilder) -> tvm.ir.Type:
        types = self._result_types(self.match(call))
        return types[0] if len(types) == 1 else relax.TupleType(types)

    def legalize(self, bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        """A call of the kernel chosen for the target, compiled once however often it is used."""
        match, statics, table = self.match(call), self.static_values(call), in_force()
        if self.weight and (problem := self._layout_problem(match, statics, table)):
            match.refuse(problem)
        sizes, make = self.sizes(match, statics), self.maker(match, statics, table.target)
        kernel = table.add(bb, self.name, self.schedules, sizes, make)
        tensors, types = list(call.args[: len(self.tensors)]), self._result_types(match)
        if self.inplace:
            return relax.op.call_tir_inplace(kernel, tensors, list(self.inplace), types)
        return relax.call_tir(kernel, tensors, types if len(types) > 1 else types[0])

    def sizes(self, match: Match, statics: Statics) -> Sizes:
        """What a kernel is built for, and chosen by; the number of rows is neither."""
        constants = {letter: size for letter, size in match.constants().items() if letter != ROWS}
        return constants | dict(statics)

    def maker(self, match: Match, statics: Statics, target: TargetSpec) -> Make:
        return lambda schedule: self.kernel(schedule, match.static, statics, target)

    def schedule(self, match: Match, statics: Statics, table: KernelTable) -> Schedule:
        sizes, make = self.sizes(match, statics), self.maker(match, statics, table.target)
        return table.choose(self.name, self.schedules, sizes, make)

    def weight_layout(self, match: Match, statics: Statics, table: KernelTable) -> Layout:
        """The layout in which the chosen kernel reads the weight."""
        assert self.layout
        return LAYOUTS[self.layout(self.schedule(match, statics, table), statics)]

    def match(self, call: relax.Call) -> Match:
        """Check a call and return its sizes; TypeError names the argument that is wrong."""
        match, names = Match(self.name), self.argument_names
        if len(call.args) != len(names):
            match.refuse(f"got {len(call.args)} arguments, takes {len(names)}: {', '.join(names)}")
        weight_last = sorted(
            zip(self.tensors, call.args, strict=False), key=lambda pair: pair[0].name == self.weight
        )
        for arg, value in weight_last:  # N is known from the scales even if the weight is packed
            match_argument = match_weight if arg.name == self.weight else Match.tensor
            match_argument(match, arg, value.ty)
        statics = self.static_values(call)
        self._check_statics(match, statics)
        self.check(match, statics)
        return match

    def static_values(self, call: relax.Call) -> Statics:
        values = {}
        for name, arg in zip(self.statics, call.args[len(self.tensors) :], strict=True):
            if not isinstance(arg, tirx.IntImm | tirx.FloatImm):
                raise TypeError(f"{self.name}: {name} is {arg}, expected a constant")
            values[name] = arg.value
        return values

    def _check_statics(self, match: Match, statics: Statics) -> None:
        for name, kind in self.statics.items():
            value = statics[name]
            if isinstance(kind, tuple):
                if value not in kind:
                    match.refuse(f"{name} is {value}, possible: {', '.join(map(str, kind))}")
            elif not isinstance(value, kind) or value <= 0:
                match.refuse(f"{name} is {value}, expected {kind.__name__} above 0")

    def _layout_problem(self, match: Match, statics: Statics, table: KernelTable) -> str | None:
        assert self.weight
        layout, found = self.weight_layout(match, statics, table), match.types[self.weight]
        shape = layout.packed_shape(match.static("N"), match.static("K"))
        if str(found.dtype) == "uint8" and same_shape(found.shape, shape):
            return None
        family = self.schedule(match, statics, table).choice.family
        return (
            f"{self.weight} is {show_type(found)}, expected uint8 {shape} of {layout.name}, "
            f"as schedules/{self.schedules}/{family}.py reads it"
        )

    def _result_types(self, match: Match) -> list[relax.TensorType]:
        overwritten = self.inplace or (NEW,) * len(self.results)
        return [
            match.result(arg) if i == NEW else match.types[self.tensors[i].name]
            for arg, i in zip(self.results, overwritten, strict=True)
        ]


def match_weight(match: Match, arg: TensorArg, type_: tvm.ir.Type) -> None:
    """A ternary weight: int8 (N, K), or uint8 in a layout that packs (N, K)."""
    if not isinstance(type_, relax.TensorType) or str(type_.dtype) != "uint8":
        match.tensor(arg, type_)
        return
    n, k = (match.static(letter) for letter in arg.dims)
    shapes = {layout.name: layout.packed_shape(n, k) for layout in LAYOUTS.values()}
    if not any(same_shape(type_.shape, shape) for shape in shapes.values()):
        packed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        match.refuse(
            f"{arg.name} is {show_type(type_)}, expected int8 {show_shape((n, k))} "
            f"or uint8 packed as {packed}"
        )
    match.types[arg.name] = type_
