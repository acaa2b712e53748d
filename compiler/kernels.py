"""Kernels: which one a call gets, for the target in force; each built once for every shape.

`using(target)` puts a target in force for passes and legalisation; outside of it, `generic` is.
A choice is a family of the target's row and a value for each of its knobs
(docs/architecture.md, "Knobs"): what a tuning record says, else the first family and the defaults.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

from tvm.ir import GlobalVar
from tvm.relax import BlockBuilder
from tvm.tirx import PrimFunc
from tvm_ffi import structural_hash

from compiler.quick_macros import install
from schedules.targets import TARGETS, TargetSpec

install()  # before a schedule is parsed

OPAQUE = 8  # relax's OpPatternKind: FuseOps leaves the function alone

Sizes = Mapping[str, int | float]  # the constants of a call: letters of its shapes, statics
Knobs = Mapping[str, tuple[int, ...]]  # name -> possible values, the default first


@dataclass(frozen=True)
class Choice:
    """A point of the design space of an op."""

    family: str
    knobs: tuple[tuple[str, int], ...] = ()  # a value for each knob of the family, in their order


@dataclass(frozen=True)
class Recorded:
    """A choice that a tuning record makes, for the kernels that were measured."""

    choice: Choice
    version: str  # `version_of` the kernels that were compared
    origin: str  # "record" of this very machine, "nearest" of another one


# (op, sizes) -> what the records say, the best first
Lookup = Callable[[str, Sizes], Iterable[Recorded]]


def no_records(op: str, sizes: Sizes) -> Iterable[Recorded]:
    return ()


@dataclass(frozen=True)
class Schedule:
    """A module of schedules/ with the knobs' values bound, called as if it had none."""

    folder: str
    choice: Choice

    def kernel(self, *args: object, **options: object) -> PrimFunc:
        return self._call("kernel", *args, **options)

    def layout(self, *args: object) -> str:
        return self._call("layout", *args)

    def _call(self, name: str, *args: object, **options: object):
        """A factory takes those knobs that it depends on."""
        factory = getattr(find_module(self.folder, self.choice.family), name)
        takes = inspect.signature(factory).parameters
        return factory(*args, **options, **{k: v for k, v in self.choice.knobs if k in takes})


Make = Callable[[Schedule], PrimFunc]  # the kernel of a call by the schedule chosen for it


@dataclass
class KernelTable:
    """The kernels built for one target. `record` tells artifact.json what ran where."""

    target: TargetSpec
    lookup: Lookup = no_records
    record: list[dict[str, object]] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)  # ops whose records are of other code
    _chosen: dict[tuple, tuple[Schedule, str]] = field(default_factory=dict)
    _built: dict[tuple, PrimFunc] = field(default_factory=dict)
    _added: dict[tuple, GlobalVar] = field(default_factory=dict)  # to the module being legalised
    _builder: BlockBuilder | None = None

    def choose(self, op: str, folder: str, sizes: Sizes, make: Make) -> Schedule:
        """The first of the recorded choices whose kernels are still those measured, else the
        default."""
        key = key_of(op, sizes)
        if key not in self._chosen:
            families = self.target.families
            default = Schedule(folder, default_choice(folder, families))
            self._chosen[key] = default, "default"
            recorded = list(self.lookup(op, sizes))
            for found in recorded:
                schedule = Schedule(folder, found.choice)
                if found.version == version_of(default, schedule, make, families):
                    self._chosen[key] = schedule, found.origin
                    break
            else:
                self.passed_over += [op] * bool(recorded)
        return self._chosen[key][0]

    def origin(self, op: str, sizes: Sizes) -> str:
        """Of what `choose` chose: "record", "nearest" or "default"."""
        return self._chosen[key_of(op, sizes)][1]

    def add(
        self, builder: BlockBuilder, op: str, folder: str, sizes: Sizes, make: Make
    ) -> GlobalVar:
        """The kernel of an operator for these sizes; built and added by the first call for them.

        `builder.add_func` finds equal functions too, but takes 2.5 ms to hash a kernel.
        """
        if self._builder is None or not self._builder.same_as(builder):
            self._builder, self._added = builder, {}
        key = key_of(op, sizes)
        if key not in self._added:
            schedule = self.choose(op, folder, sizes, make)
            self._added[key] = builder.add_func(self._build(key, op, schedule, sizes, make), op)
        return self._added[key]

    def _build(self, key: tuple, op: str, schedule: Schedule, sizes: Sizes, make) -> PrimFunc:
        if key not in self._built:
            attrs = {"tirx.is_scheduled": True, "op_pattern": OPAQUE}
            self._built[key] = make(schedule).with_attr(attrs)
            choice, origin = schedule.choice, self.origin(op, sizes)
            self.record.append(
                {
                    "op": op,
                    "shape": dict(sizes),
                    "family": choice.family,
                    "knobs": dict(choice.knobs),
                    "from": origin,
                }
            )
        return self._built[key]


def key_of(op: str, sizes: Sizes) -> tuple:
    return op, *sorted(sizes.items())


_IN_FORCE: ContextVar[KernelTable | None] = ContextVar("kernels", default=None)


@contextmanager
def using(target: TargetSpec, lookup: Lookup = no_records) -> Iterator[KernelTable]:
    """Compile for `target` within the block; the table says what was built."""
    table = KernelTable(target, lookup)
    token = _IN_FORCE.set(table)
    try:
        yield table
    finally:
        _IN_FORCE.reset(token)


def in_force() -> KernelTable:
    return _IN_FORCE.get() or KernelTable(TARGETS["generic"])


@cache
def families_of(folder: str, families: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a target's families that have a module in `schedules/<folder>/`, the best first."""
    package = importlib.util.find_spec(f"schedules.{folder}")
    return tuple(
        family
        for family in families
        if package and importlib.util.find_spec(f"schedules.{folder}.{family}")
    )


@cache
def find_module(folder: str, family: str) -> ModuleType:
    return importlib.import_module(f"schedules.{folder}.{family}")


def knobs_of(folder: str, family: str) -> Knobs:
    """What a kernel leaves open; no knobs where its module has no table of them."""
    return getattr(find_module(folder, family), "KNOBS", {})


def default_choice(folder: str, families: tuple[str, ...]) -> Choice:
    """The first family for which `schedules/<folder>/` has a module, every knob's first value."""
    for family in families_of(folder, families):
        knobs = knobs_of(folder, family)
        return Choice(family, tuple((name, values[0]) for name, values in knobs.items()))
    raise NotImplementedError(
        f"{folder}: no schedule in schedules/{folder}/ for families {', '.join(families)}"
    )


def is_possible(choice: Choice, folder: str, families: tuple[str, ...]) -> bool:
    """Whether the target has the family, and the family these knobs and values."""
    if choice.family not in families_of(folder, families):
        return False
    knobs = knobs_of(folder, choice.family)
    names = [name for name, _ in choice.knobs]
    return names == list(knobs) and all(value in knobs[name] for name, value in choice.knobs)


def version_of(
    default: Schedule, chosen: Schedule, make: Make, families: tuple[str, ...]
) -> str | None:
    """What was compared: hashes of the default kernel and of the chosen one as they are built now.
    None where the choice is none of the target's families, or none any more."""
    if not is_possible(chosen.choice, chosen.folder, families):
        return None
    try:
        return version(make(default), make(chosen))
    except ValueError:
        return None


def version(default: PrimFunc, chosen: PrimFunc) -> str:
    """Hashes of what their factories made of both."""
    hashes = (structural_hash(kernel) & 2**64 - 1 for kernel in (default, chosen))
    return "-".join(f"{value:016x}" for value in hashes)
