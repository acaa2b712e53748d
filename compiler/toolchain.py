"""toolchain: the programs outside Python that a build runs, found before it starts."""

import platform
import shutil
from contextlib import AbstractContextManager, nullcontext

from compiler import nvcc
from compiler.config import BuildError
from schedules.targets import CpuTarget, GpuTarget, TargetSpec

LINKERS = ("gcc", "cc", "clang")
CROSS_LINKERS = {"aarch64": ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")}  # program, package


def find_linker(target: TargetSpec) -> str:
    """The C compiler that links the library for the target's machine."""
    machine = target.machine if isinstance(target, CpuTarget) else ""
    if machine not in ("", platform.machine()):
        return find_cross_linker(target.name, machine)
    for name in LINKERS:
        if path := shutil.which(name):
            return path
    raise BuildError(
        f"linker: asked for a C compiler, found none of {', '.join(LINKERS)} on the PATH; "
        "possible: apt-get install gcc"
    )


def find_cross_linker(target: str, machine: str) -> str:
    if machine not in CROSS_LINKERS:
        raise BuildError(
            f"linker: {target} is for {machine}, this host is {platform.machine()}, and no cross "
            f"compiler is known for it; possible: build on a {machine} host"
        )
    program, package = CROSS_LINKERS[machine]
    if path := shutil.which(program):
        return path
    raise BuildError(
        f"linker: {target} is for {machine}, this host is {platform.machine()}: asked for "
        f"{program}, found none on the PATH; possible: apt-get install {package}"
    )


def require_device_compiler(target: TargetSpec) -> None:
    """Refuses before the long phases what `device_compiler` could not do after them."""
    if isinstance(target, GpuTarget):
        nvcc.require(target)


def device_compiler(target: TargetSpec) -> AbstractContextManager[None]:
    """What TVM compiles device code with, for as long as the block runs."""
    if isinstance(target, GpuTarget):
        return nvcc.compiling_for(target, nvcc.find_nvcc(target))
    return nullcontext()
