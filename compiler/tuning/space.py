"""Space: the design space of one kernel, as MetaSchedule sees it.

The workload is a PrimFunc of one block that stands for the kernel and names its op and sizes in
attributes. A template writes the family and, sampled, a value for every knob as annotations on the
block; there is one design space (a template) a family. The search lists the points of these spaces
and sets a template's decisions to the one that it wants; the builder reads the annotations and
makes the real kernel with its factory. So a record's trace replays as any of MetaSchedule's does.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import product

import tvm
from tvm import te
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from compiler.kernels import Choice, Sizes, families_of, knobs_of
from compiler.tuning.store import KNOB
from schedules.targets import TargetSpec

BLOCK = "kernel"


def workload(op: str, sizes: Sizes, target: TargetSpec) -> tvm.IRModule:
    """Made from a te.compute: functions parsed from a file carry its path in their spans."""
    stands_for = te.compute((1,), lambda _: tvm.tirx.const(0, "int32"), name=BLOCK)
    facts = {"op": op, "sizes": canonical(sizes), "target": target.name}
    function = te.create_prim_func([stands_for]).with_attr("global_symbol", "main")
    return tvm.IRModule({"main": function.with_attr(facts)})


def canonical(sizes: Sizes) -> str:
    """`K=64 N=128`: without the quotes that a trace does not escape."""
    return " ".join(f"{name}={value!r}" for name, value in sorted(sizes.items()))


def annotate(schedule: Schedule, facts: Mapping[str, str | int]) -> None:
    block = schedule.get_sblock(BLOCK)
    for name, value in facts.items():
        schedule.annotate(block, name, value.replace('"', "'") if isinstance(value, str) else value)


def apply_template(
    schedule: Schedule, folder: str, family: str, choice: Choice | None = None
) -> None:
    """Annotate the family and its knobs: sampled, or as `choice` has them."""
    block = schedule.get_sblock(BLOCK)
    schedule.annotate(block, "family", family)
    chosen = dict(choice.knobs) if choice else {}
    for name, values in knobs_of(folder, family).items():
        decision = values.index(chosen[name]) if choice else None
        even = [1 / len(values)] * len(values)
        value = schedule.sample_categorical(list(values), even, decision)
        schedule.annotate(block, KNOB + name, value)


def design_spaces(folder: str, target: TargetSpec) -> ms.space_generator.ScheduleFn:
    """One a family of the target's row."""

    def spaces(schedule: Schedule) -> list[Schedule]:
        found = []
        for family in families_of(folder, target.families):
            found.append(schedule.copy())
            apply_template(found[-1], folder, family)
        return found

    return ms.space_generator.ScheduleFn(spaces, sch_rules=[], postprocs=[], mutator_probs={})


def schedule_of(module: tvm.IRModule, folder: str, choice: Choice) -> Schedule:
    """The point of the space that `choice` is."""
    schedule = Schedule(module)
    apply_template(schedule, folder, choice.family, choice)
    return schedule


def choice_in(module: tvm.IRModule) -> Choice:
    """What the annotations of a scheduled workload say."""
    schedule = Schedule(module)
    facts = schedule.get(schedule.get_sblock(BLOCK)).annotations
    knobs = ((str(k).removeprefix(KNOB), int(v)) for k, v in facts.items() if KNOB in str(k))
    return Choice(str(facts["family"]), tuple(knobs))


def points(folder: str, target: TargetSpec) -> Iterator[Choice]:
    """Every combination, the default first; some may be refused by their factory."""
    for family in families_of(folder, target.families):
        knobs = knobs_of(folder, family)
        for values in product(*knobs.values()):
            yield Choice(family, tuple(zip(knobs, values, strict=True)))


def size(folder: str, target: TargetSpec) -> int:
    return sum(
        math.prod(len(values) for values in knobs_of(folder, family).values())
        for family in families_of(folder, target.families)
    )
