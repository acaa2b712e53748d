"""A kernel compiled by itself, called with numpy arrays; the targets that this host can run.

Kernels for another machine than this one run under its emulator, by the same tests.
"""

import importlib.util
import os

import numpy as np
import pytest
import tvm

from schedules.targets import TARGETS, CpuTarget
from tests.arm import emulator

# Uneven shares of the blocks, whatever the host has; read when the first parallel loop starts.
os.environ.setdefault("TVM_NUM_THREADS", "3")

ROWS = (0, 1, 2, 5, 33, 128)  # none, decode, and prefills that no tile divides
EMULATED = "aarch64"  # the machine whose kernels any host runs
# Boards' kernels are those of their instruction set
CPU_ROWS = [row for row in TARGETS.values() if isinstance(row, CpuTarget) and not row.is_board]


def is_emulated(target: CpuTarget) -> bool:
    return target.machine == EMULATED and not target.runs_here()


def why_not(target: CpuTarget) -> str | None:
    """Why kernels for the target cannot be run here."""
    if is_emulated(target):
        return emulator.missing()
    return None if target.runs_here() else f"needs {target.machine} with {target.cpu_flags}"


def params(targets: list[CpuTarget]) -> list:
    """pytest's parameters, with the reason where a target is skipped."""
    return [
        pytest.param(spec, id=spec.name, marks=pytest.mark.skipif(bool(reason), reason=str(reason)))
        for spec in targets
        for reason in (why_not(spec),)
    ]


def family(folder: str, target: CpuTarget) -> str:
    """The one of whose kernels a build for `target` takes the op's."""
    for name in target.families:
        if importlib.util.find_spec(f"schedules.{folder}.{name}"):
            return name
    raise AssertionError(f"{folder}: no kernel in {target.families}")


def every_target(folder: str) -> list:
    """Rows to run an op's kernels for: every one of this machine; of the emulated, which is slow,
    the first row of each family that has a file in the op's folder."""
    emulated = {family(folder, spec): spec for spec in reversed(CPU_ROWS) if is_emulated(spec)}
    return params([spec for spec in CPU_ROWS if spec in emulated.values() or not is_emulated(spec)])


# For what a kernel is embedded in, and is run by this process itself
NATIVE_TARGETS = params([spec for spec in CPU_ROWS if not is_emulated(spec)])


def compiled(func: tvm.tirx.PrimFunc, target: CpuTarget):
    """call(*arrays) -> the arrays as the kernel left them, outputs and caches included."""
    mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
    executable = tvm.compile(mod, target=target.to_tvm())
    if is_emulated(target):
        return emulator.EmulatedKernel(executable, target)
    entry = executable["kernel"]

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        entry(*tensors)
        return [t.numpy() for t in tensors]

    return call
