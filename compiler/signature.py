"""Signatures: an operator's tensor arguments, as the tables of docs/architecture.md write them.

`parse("q i8[M, K]", "scale f32[M]")` is matched against Relax types. A letter stands for one
size wherever it appears, so a wrong argument is refused by name, with what it should match:

    ternary_matmul: w is int8 (64, 32), expected (64, 48) to match q (m, 48)
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

import tvm
from tvm import relax, tirx
from tvm.sym import Analyzer

Size: TypeAlias = tvm.ir.Expr  # a constant, or a symbol such as M

DTYPES = {
    **{"f32": "float32", "f16": "float16", "i8": "int8", "u8": "uint8"},
    **{"i32": "int32", "i64": "int64"},
}
ANY = "any"  # a dtype that the operator's own check decides
ANALYZER = Analyzer()


@dataclass(frozen=True)
class TensorArg:
    name: str
    dtype: str  # a TVM dtype, or ANY
    dims: tuple[str, ...]  # a letter, or a number


def parse(*declarations: str) -> tuple[TensorArg, ...]:
    """`q i8[M, K]` -> TensorArg; a result has no name: `f32[M, N]`."""
    return tuple(_parse_one(text) for text in declarations)


def _parse_one(text: str) -> TensorArg:
    found = re.fullmatch(r"(?:(\w+) )?(\w+)\[([\w, ]*)\]", text)
    assert found, f"not a declaration: {text!r}"
    name, dtype, dims = found.groups()
    return TensorArg(name or "", DTYPES.get(dtype, dtype), tuple(dims.replace(" ", "").split(",")))


@dataclass
class Match:
    """The sizes that the letters of a signature stand for in one call."""

    op: str
    dims: dict[str, Size] = field(default_factory=dict)
    source: dict[str, str] = field(default_factory=dict)  # letter -> argument that fixed it
    types: dict[str, relax.TensorType] = field(default_factory=dict)

    def tensor(self, arg: TensorArg, type_: tvm.ir.Type) -> None:
        """Match one argument, binding the letters met for the first time."""
        if not isinstance(type_, relax.TensorType):
            self.refuse(f"{arg.name} is {type_}, expected a tensor {self.expected(arg)}")
        if type_.shape is None or type_.dtype is None:
            self.refuse(f"{arg.name} is {type_}, expected {self.expected(arg)}: shape and dtype")
        found = list(type_.shape)
        self.types[arg.name] = type_
        if arg.dtype not in (ANY, str(type_.dtype)) or len(found) != len(arg.dims):
            self.refuse(f"{arg.name} is {show_type(type_)}, expected {self.expected(arg)}")
        for letter, size in zip(arg.dims, found, strict=True):
            if letter.isdigit():
                if not same(size, int(letter)):
                    self.refuse(f"{arg.name} is {show_type(type_)}, expected {self.expected(arg)}")
            elif letter not in self.dims:
                self.dims[letter], self.source[letter] = size, arg.name
            elif not same(size, self.dims[letter]):
                self.refuse_size(arg, type_, letter)

    def refuse_size(self, arg: TensorArg, type_: relax.TensorType, letter: str) -> NoReturn:
        source = self.source[letter]
        shape = show_shape(self.types[source].shape) if source in self.types else self.dims[letter]
        expected = show_shape(self.dims.get(dim, dim) for dim in arg.dims)
        self.refuse(
            f"{arg.name} is {show_type(type_)}, expected {expected} to match {source} {shape}"
        )

    def bind(self, letter: str, size: int, source: str) -> None:
        """Fix a letter that no argument spells out, such as half a head's size."""
        self.dims[letter], self.source[letter] = tirx.IntImm("int64", size), source

    def static(self, letter: str) -> int:
        """A size that must be known when compiling."""
        size = self.dims[letter]
        if not isinstance(size, tirx.IntImm):
            self.refuse(f"{letter} of {self.source[letter]} is {size}, expected a constant")
        return int(size)

    def constants(self) -> dict[str, int]:
        """The sizes known when compiling, by letter."""
        return {key: int(v) for key, v in self.dims.items() if isinstance(v, tirx.IntImm)}

    def expected(self, arg: TensorArg) -> str:
        shape = show_shape(self.dims.get(dim, dim) for dim in arg.dims)
        return shape if arg.dtype == ANY else f"{arg.dtype} {shape}"

    def result(self, arg: TensorArg) -> relax.TensorType:
        shape = [int(dim) if dim.isdigit() else self.dims[dim] for dim in arg.dims]
        return relax.TensorType(shape, arg.dtype)

    def refuse(self, problem: str) -> NoReturn:
        raise TypeError(f"{self.op}: {problem}")


def same(a: Size | int, b: Size | int) -> bool:
    return bool(ANALYZER.can_prove_equal(a, b))


def same_shape(a: Sequence[Size | int], b: Sequence[Size | int]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def show_shape(shape: Iterable[Size | str | int]) -> str:
    sizes = [str(s.value) if isinstance(s, tirx.IntImm) else str(s) for s in shape]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"


def show_type(type_: relax.TensorType) -> str:
    return f"{type_.dtype} {show_shape(type_.shape)}"
