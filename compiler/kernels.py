"""Kernels: the schedule chosen for the target in force, built once for every shape.

`using(target)` puts a target in force for passes and legalisation; outside of it, `generic` is.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

from tvm.ir import GlobalVar
from tvm.relax import BlockBuilder
from tvm.tirx import PrimFunc

from compiler.quick_macros import install
from schedules.targets import TARGETS, TargetSpec

install()  # before a schedule is parsed

OPAQUE = 8  # relax's OpPatternKind: FuseOps leaves the function alone


@dataclass
class KernelTable:
    """The kernels built for one target. `record` tells artifact.json what ran where."""

    target: TargetSpec
    record: list[dict[str, object]] = field(default_factory=list)
    _built: dict[tuple, PrimFunc] = field(default_factory=dict)
    _added: dict[tuple, GlobalVar] = field(default_factory=dict)  # to the module being legalised
    _builder: BlockBuilder | None = None

    def add(
        self,
        builder: BlockBuilder,
        op: str,
        family: str,
        sizes: dict[str, int | float],
        make: Callable[[], PrimFunc],
    ) -> GlobalVar:
        """The kernel of an operator for these sizes; built and added by the first call for them.

        `builder.add_func` finds equal functions too, but takes 2.5 ms to hash a kernel.
        """
        if self._builder is None or not self._builder.same_as(builder):
            self._builder, self._added = builder, {}
        key = (op, *sizes.items())
        if key not in self._added:
            self._added[key] = builder.add_func(self._build(key, op, family, sizes, make), op)
        return self._added[key]

    def _build(self, key: tuple, op: str, family: str, sizes: dict, make) -> PrimFunc:
        if key not in self._built:
            attrs = {"tirx.is_scheduled": True, "op_pattern": OPAQUE}
            self._built[key] = make().with_attr(attrs)
            self.record.append({"op": op, "shape": sizes, "family": family})
        return self._built[key]


_IN_FORCE: ContextVar[KernelTable | None] = ContextVar("kernels", default=None)


@contextmanager
def using(target: TargetSpec) -> Iterator[KernelTable]:
    """Compile for `target` within the block; the table says what was built."""
    table = KernelTable(target)
    token = _IN_FORCE.set(table)
    try:
        yield table
    finally:
        _IN_FORCE.reset(token)


def in_force() -> KernelTable:
    return _IN_FORCE.get() or KernelTable(TARGETS["generic"])


@cache
def find_schedule(folder: str, families: tuple[str, ...]) -> tuple[str, ModuleType]:
    """(family, module) of the first family for which `schedules/<folder>/` has a module."""
    for family in families:
        name = f"schedules.{folder}.{family}"
        if importlib.util.find_spec(f"schedules.{folder}") and importlib.util.find_spec(name):
            return family, importlib.import_module(name)
    raise NotImplementedError(
        f"{folder}: no schedule in schedules/{folder}/ for families {', '.join(families)}"
    )
