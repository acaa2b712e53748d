"""nvcc: device code for every arch of a GPU's row, one fat binary; needs no GPU.

    kernels -> CUDA source -> nvcc, here -> fat binary -> text in the library -> as it was, at load

Left alone, TVM 0.27 ships the source and compiles it where it is loaded, with --use_fast_math,
which flushes denormals and approximates divisions and roots; the dialect defines both to the last
bit. Its module takes text and hands that to `tvm_callback_cuda_compile` when it is first used:
runtime/device_code.py gives it the binary back. Products may be contracted into sums (--fmad): the
definitions allow for it where it can happen.
"""

import base64
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tvm
import tvm_ffi

from compiler.config import BuildError
from schedules.targets import GpuTarget

AT_BUILD = "tvm_callback_cuda_postproc"  # TVM calls it with the source of all kernels
AT_USE = "tvm_callback_cuda_compile"  # and this with what the former made of it
PREFIX = "fatbin:"  # what runtime/device_code.py knows the text by
FLAGS = ("-O3", "--std=c++17", "--expt-relaxed-constexpr", "--threads=0")


def find_nvcc(target: GpuTarget) -> str:
    if path := shutil.which("nvcc"):
        return path
    raise BuildError(
        f"nvcc: {target.name} needs it to compile for {', '.join(target.archs)}, found none on the "
        "PATH; possible: install the CUDA toolkit, 13.0 or later, and put its bin on the PATH"
    )


def require(target: GpuTarget) -> None:
    """Refuses an nvcc that cannot compile an empty kernel for the target: an old one, for one."""
    nvcc = find_nvcc(target)
    try:
        compile_fat("__global__ void nothing() {}", target.archs, nvcc)
    except RuntimeError as error:
        reasons = [line for line in str(error).splitlines()[1:] if line.strip()]
        raise BuildError(
            f"nvcc: {target.name} asks for {', '.join(target.archs)}; {nvcc} says: "
            f"{reasons[0] if reasons else 'nothing'}; possible: CUDA 13.0 or later, with g++"
        ) from error


def gencode(archs: Sequence[str]) -> list[str]:
    """Machine code for each arch; PTX of the last one too, for GPUs to come.

    Archs with a letter (sm_90a) have instructions of that one chip: their PTX runs nowhere else.
    """
    flags = []
    for arch in archs:
        flags += ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}"]
    if archs[-1][-1].isdigit():
        virtual = archs[-1].replace("sm", "compute")
        flags += ["-gencode", f"arch={virtual},code={virtual}"]
    return flags


def compile_fat(source: str, archs: Sequence[str], nvcc: str) -> bytes:
    """CUDA C++ source -> a fat binary; a RuntimeError holds what nvcc printed."""
    with tempfile.TemporaryDirectory(prefix="bitnet-nvcc-") as directory:
        code, binary = Path(directory, "kernels.cu"), Path(directory, "kernels.fatbin")
        code.write_text(source, encoding="utf-8")
        command = [nvcc, "--fatbin", *FLAGS, *gencode(archs), "-o", str(binary), str(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr or done.stdout}")
        return binary.read_bytes()


def to_text(binary: bytes) -> str:
    return f"{PREFIX}{base64.b64encode(binary).decode('ascii')}\n"


def to_binary(text: str) -> bytes:
    return base64.b64decode(text.removeprefix(PREFIX))


def uncompacted() -> tvm.transform.PassContext:
    """Kernels for GPUs allocate what they need; TVM's shrinking of buffers to what it sees accessed
    is wrong where they are addressed by number, and takes a minute on a kernel of 400 accesses."""
    return tvm.transform.PassContext(disabled_pass=["s_tir.CompactBufferAllocation"])


@contextmanager
def compiling_for(target: GpuTarget, nvcc: str) -> Iterator[None]:
    """Within the block, TVM puts binaries where it would put sources.

    Where a GPU is, TVM asks for the binary as soon as the module is made.
    """

    def compile_source(source: str, _: object) -> str:
        return to_text(compile_fat(source, target.archs, nvcc))

    before = tvm_ffi.get_global_func(AT_USE, allow_missing=True)
    tvm_ffi.register_global_func(AT_BUILD, compile_source, override=True)
    tvm_ffi.register_global_func(AT_USE, to_binary, override=True)
    try:
        with uncompacted():
            yield
    finally:
        tvm_ffi.remove_global_func(AT_BUILD)
        if before is not None:
            tvm_ffi.register_global_func(AT_USE, before, override=True)
