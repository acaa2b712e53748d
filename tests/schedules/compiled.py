"""A kernel compiled by itself, called with numpy arrays; the targets that this host can run.

Kernels for another machine than this one run under its emulator, by the same tests; those for GPUs
where there is one, and elsewhere they are only compiled (test_cuda.py).
"""

import importlib.util
import os

import numpy as np
import pytest
import tvm
from tvm_ffi import structural_hash

from compiler import nvcc
from runtime import device_code
from runtime.device import runs_on
from schedules.targets import TARGETS, CpuTarget, GpuTarget, TargetSpec, compute_capability
from tests.arm import emulator

# Uneven shares of the blocks, whatever the host has; read when the first parallel loop starts.
os.environ.setdefault("TVM_NUM_THREADS", "3")

ROWS = (0, 1, 2, 5, 33, 128)  # none, decode, and prefills that no tile divides
EMULATED = "aarch64"  # the machine whose kernels any host runs
# Boards' kernels are those of their instruction set
CPU_ROWS = [row for row in TARGETS.values() if isinstance(row, CpuTarget) and not row.is_board]
if compute_capability():
    device_code.install()
# By the PTX in it, a build for sm_80 runs on every later GPU
GPU_ROWS = [TARGETS["cuda-sm80"], TARGETS["cuda-sm90"]]


def is_emulated(target: TargetSpec) -> bool:
    return isinstance(target, CpuTarget) and target.machine == EMULATED and not target.runs_here()


def why_not(target: TargetSpec) -> str | None:
    """Why kernels for the target cannot be run here."""
    if isinstance(target, GpuTarget):
        found = compute_capability()
        last = target.archs[-1]  # whose PTX a build has, too
        capability = found and f"{found[0]}.{found[1]}"
        if capability and any(runs_on(arch, capability, arch == last) for arch in target.archs):
            return None
        return f"needs a GPU of {target.archs[0]}"
    assert isinstance(target, CpuTarget)
    if is_emulated(target):
        return emulator.missing()
    return None if target.runs_here() else f"needs {target.machine} with {target.cpu_flags}"


def params(targets: list[TargetSpec]) -> list:
    """pytest's parameters, with the reason where a target is skipped."""
    return [
        pytest.param(spec, id=spec.name, marks=pytest.mark.skipif(bool(reason), reason=str(reason)))
        for spec in targets
        for reason in (why_not(spec),)
    ]


def family(folder: str, target: TargetSpec) -> str:
    """The one of whose kernels a build for `target` takes the op's."""
    for name in target.families:
        if importlib.util.find_spec(f"schedules.{folder}.{name}"):
            return name
    raise AssertionError(f"{folder}: no kernel in {target.families}")


def every_cpu(folder: str) -> list[TargetSpec]:
    """Of this machine, a row for each family and width of vectors that an op's kernels have, one
    that this host runs if it can; of the emulated machine, which is slow, the first row of each
    family that has a file in the op's folder, and the last of `generic`'s, whose code is LLVM's
    choice of instructions."""
    slow = [row for row in CPU_ROWS if is_emulated(row)]
    emulated = [*{family(folder, row): row for row in reversed(slow)}.values()]
    emulated += [row for row in slow if family(folder, row) == "generic"][-1:]
    own = sorted((r for r in CPU_ROWS if not is_emulated(r)), key=lambda row: row.runs_here())
    distinct = {(family(folder, row), row.vector_bits): row for row in own}
    return [r for r in CPU_ROWS if r in emulated or r in distinct.values()]


def every_gpu(folder: str) -> list[TargetSpec]:
    """A row for each family that has a file in an op's folder."""
    return list({family(folder, spec): spec for spec in GPU_ROWS}.values())


def every_target(folder: str) -> list:
    """pytest's parameters: the rows to run an op's kernels for."""
    return params([*every_cpu(folder), *every_gpu(folder)])


# For what a kernel is embedded in, and is run by this process itself
NATIVE_TARGETS = params([spec for spec in CPU_ROWS if not is_emulated(spec)])


# Libraries are files: all are kept, as some kernels of 4- and of 8-bit activations are the same
_emulated: dict[tuple[int, str], emulator.EmulatedKernel] = {}


def executable_of(func: tvm.tirx.PrimFunc, target: TargetSpec) -> tvm.runtime.Executable:
    mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
    return tvm.compile(mod, target=target.to_tvm())


def compiled(func: tvm.tirx.PrimFunc, target: TargetSpec):
    """call(*arrays) -> the arrays as the kernel left them, outputs and caches included."""
    if is_emulated(target):
        key = structural_hash(func), target.name
        if key not in _emulated:
            _emulated[key] = emulator.EmulatedKernel(executable_of(func, target), target)
        return _emulated[key]
    device = tvm.cpu()
    if isinstance(target, GpuTarget):
        device = tvm.cuda()
        with nvcc.compiling_for(target, nvcc.find_nvcc(target)):
            executable = executable_of(func, target)
    else:
        executable = executable_of(func, target)
    entry = executable["kernel"]

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        tensors = [tvm.runtime.tensor(a, device) for a in arrays]
        entry(*tensors)
        return [t.numpy() for t in tensors]

    return call
