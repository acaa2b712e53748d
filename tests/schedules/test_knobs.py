"""Every value of every knob at least once, several at a time: the bits of the reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from compiler.kernels import Choice, Schedule, families_of, find_module, knobs_of
from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS, TargetSpec
from tests.schedules.compiled import compiled, why_not
from tests.schedules.matmul_reference import (
    activations,
    exact_sum,
    grouped_table,
    ones,
    weights,
)

ROWS = (1, 2, 5, 33)
N, K = 330, 2563  # no multiple of any tile; rows enough for several tiles of any share of L2


@dataclass(frozen=True)
class Case:
    folder: str
    layout_args: tuple | None  # None: weights are not packed
    kernel_args: tuple = ()
    kernel_end: tuple = ()
    act_bits: int = 8
    sparse: bool = False
    k: int = K

    def build(self, choice: Choice, target: TargetSpec):
        schedule = Schedule(self.folder, choice)
        return schedule.kernel(N, self.k, *self.kernel_args, target, *self.kernel_end)


CASES = (
    Case("ternary_matmul", (4, "scale"), (4,), ("scale",), act_bits=4),
    Case("ternary_matmul", (4, "glu"), (4,), ("glu",), act_bits=4),
    Case("sparse_ternary_matmul", (), sparse=True),
    Case("int8_matmul", None),
    Case("grouped_matmul", None, (6,), k=2560),
)


def name(target: TargetSpec, family: str) -> str:
    """As `-k cuda` finds it."""
    return f"cuda-{family}" if target.needs()["device"] == "cuda" else family


def repeats_gated(case: Case, family: str) -> bool:
    """Whether a family multiplies ungated rows by the kernels of its gated ones."""
    layout = find_module(case.folder, family).layout if case.kernel_end == ("scale",) else None
    return layout is not None and layout(4, "scale") == layout(4, "glu")


def is_another_with_arguments(folder: str, family: str, families: tuple[str, ...]) -> bool:
    """Whether a family is another family's kernel with other instructions, whose knobs are run."""
    kernel = find_module(folder, family).kernel
    if not isinstance(kernel, partial):
        return False
    return kernel.func.__module__.rpartition(".")[2] in families


def families() -> list:
    """(case, target, family) of every family that has knobs, for the first target of it."""
    found = {}
    for case in CASES:
        for target in TARGETS.values():
            for family in families_of(case.folder, target.families):
                if not knobs_of(case.folder, family) or repeats_gated(case, family):
                    continue
                if not is_another_with_arguments(case.folder, family, target.families):
                    found.setdefault((case, family), target)
    return [
        pytest.param(
            case,
            target,
            family,
            id="-".join((case.folder, *case.kernel_end, str(case.act_bits), name(target, family))),
            marks=pytest.mark.skipif(bool(why_not(target)), reason=str(why_not(target))),
        )
        for (case, family), target in found.items()
    ]


def covering(case: Case, target: TargetSpec, family: str) -> Iterator[tuple[Choice, object]]:
    """Choices and kernels in which each value appears that a kernel of this form can have."""
    knobs = knobs_of(case.folder, family)
    default = {name: values[0] for name, values in knobs.items()}
    left = {name: list(values) for name, values in knobs.items()}
    while any(left.values()):
        new = {name: values.pop(0) for name, values in left.items() if values}
        for change in (new, *({name: value} for name, value in new.items())):
            choice = Choice(family, tuple((default | change).items()))
            try:
                yield choice, case.build(choice, target)
            except ValueError as refusal:  # together or alone: no candidate
                assert case.folder in str(refusal)
                continue
            if change is new:
                break


def density(case: Case, m: int) -> float:
    """Of the columns that are active: on both sides of the thresholds between the forms."""
    return {1: 0.1, 2: 0.9, 5: 0.6, 33: 0.05}[m] if case.sparse else 1.0


@pytest.mark.parametrize("case, target, family", families())
def test_same_bits(case, target, family):
    kernels = list(covering(case, target, family))
    assert len(kernels) > 1
    for choice, kernel in kernels:
        check(case, choice, compiled(kernel, target))


def weights_of(case, choice) -> tuple[np.ndarray, np.ndarray]:
    """The weights and what the kernel reads."""
    if case.folder == "grouped_matmul":
        return grouped_table(N, case.k, *case.kernel_args)
    if case.layout_args is None:
        return (w := activations("random", N, case.k, 8)), w
    layout = Schedule(case.folder, choice).layout(*case.layout_args)
    return (w := weights("random", N, case.k)), LAYOUTS[layout].pack(w)


def check(case, choice, call):
    w, packed = weights_of(case, choice)
    for m in ROWS:
        q = activations("random", m, case.k, case.act_bits, m)
        q[:, np.random.default_rng(m).random(case.k) >= density(case, m)] = 0
        scale, w_scale = ones(m, N)
        before, after, expected = [q, scale], [], exact_sum(q, w)
        if case.sparse:
            index = np.argsort(q == 0, axis=1, kind="stable").astype(np.int32)
            before += [index, (q != 0).sum(1).astype(np.int32)]
            after = [np.full((m, N), 3, np.float32)]
            expected = expected + np.float32(3)
        if case.kernel_end == ("glu",):
            gate = np.random.default_rng(m).integers(-2, 3, (m, N)).astype(np.float32)
            gate[:, :128] = -1  # blocks without a live output
            after = [gate]
            expected = np.maximum(gate, 0) ** 2 * expected
        out = np.full((m, N), np.nan, np.float32)
        found = call(*before, packed, w_scale, *after, out)[-1]
        np.testing.assert_array_equal(found, expected, err_msg=str(choice))
