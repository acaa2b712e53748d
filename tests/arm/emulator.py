"""Kernels compiled for aarch64, called under qemu by tests/arm/runner.cpp on any Linux host.

One emulator a process and CPU: it is started by the first call and serves all later ones. A kernel
that touches memory which is not its own, or an instruction that its CPU lacks, ends the emulator;
the call raises, and the next one starts another.
"""

import functools
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi

from compiler.toolchain import find_linker
from schedules.targets import CpuTarget

PROGRAMS = {  # program: Debian package
    "qemu-aarch64": "qemu-user",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
}
LIBRARIES = "/usr/aarch64-linux-gnu"  # where the cross compiler's package has the C library
# The least CPU that has a family's instructions: one too new for it is a fault and not a surprise.
CPUS = {"neon": "cortex-a72", "dotprod": "cortex-a76"}
CALL_SECONDS = 300  # until a kernel counts as hanging; the slowest takes some 10
# DLPack's codes of numpy's kinds
CODES = {"i": 0, "u": 1, "f": 2}


def missing() -> str | None:
    """Why nothing can be emulated here; None if it can."""
    lacking = [program for program in PROGRAMS if not shutil.which(program)]
    if not lacking:
        return None
    packages = " ".join(PROGRAMS[program] for program in lacking)
    return f"found no {', no '.join(lacking)}; possible: apt-get install {packages}"


@functools.cache
def directory() -> tempfile.TemporaryDirectory:
    """Of the runner and the kernels of this process; removed at its end."""
    return tempfile.TemporaryDirectory(prefix="bitnet-arm-")


@functools.cache
def runner() -> Path:
    path = Path(directory().name) / "runner"
    source = Path(__file__).with_name("runner.cpp")
    include = Path(tvm_ffi.__file__).parent / "include"
    flags = ["-O1", "-Wall", "-Werror", "-rdynamic", f"-I{include}"]
    command = ["aarch64-linux-gnu-g++", *flags, source, "-o", path, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return path


class Emulator:
    def __init__(self, cpu: str, options: tuple[str, ...] = ()):
        self.cpu = cpu
        self.options = options  # more of qemu's
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        if self.process is None:
            threads = os.environ.get("TVM_NUM_THREADS", "3")
            qemu = ["qemu-aarch64", "-cpu", self.cpu, "-L", LIBRARIES, *self.options]
            self.process = subprocess.Popen(
                [*qemu, runner(), threads],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        return self.process

    def call(self, library: Path, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """The arrays as the library's kernel left them."""
        process = self.start()
        assert process.stdin and process.stdout
        watchdog = threading.Timer(CALL_SECONDS, process.kill)
        watchdog.start()
        try:
            path = os.fsencode(library)
            process.stdin.write(struct.pack("<I", len(path)) + path)
            process.stdin.write(struct.pack("<I", len(arrays)))
            for a in arrays:
                kind = CODES[a.dtype.kind], 8 * a.dtype.itemsize, a.ndim, *a.shape
                process.stdin.write(struct.pack(f"<BBI{a.ndim}q", *kind))
                process.stdin.write(np.ascontiguousarray(a).data.cast("B") if a.size else b"")
            process.stdin.flush()
            (length,) = struct.unpack("<I", self.read(4))
            if error := self.read(length).decode():
                raise RuntimeError(error)
            found = [np.frombuffer(self.read(a.nbytes), a.dtype) for a in arrays]
        except (BrokenPipeError, EOFError):
            raise RuntimeError(f"{self.cpu}: {self.obituary()}") from None
        finally:
            watchdog.cancel()
        return [f.reshape(a.shape) for f, a in zip(found, arrays, strict=True)]

    def stop(self) -> str:
        """Let the runner end; returns what it and qemu wrote on stderr."""
        assert self.process
        process, self.process = self.process, None
        return process.communicate()[1].decode()

    def read(self, count: int) -> bytearray:
        assert self.process and self.process.stdout
        data = bytearray(count)
        if self.process.stdout.readinto(data) != count:
            raise EOFError
        return data

    def obituary(self) -> str:
        assert self.process
        process, self.process = self.process, None
        _, stderr = process.communicate()
        return f"exit status {process.returncode}: {stderr.decode(errors='replace').strip()}"


@functools.cache
def emulator(cpu: str) -> Emulator:
    return Emulator(cpu)


class EmulatedKernel:
    """call(*arrays) -> the arrays as the kernel left them."""

    count = 0

    def __init__(self, executable: tvm.runtime.Executable, target: CpuTarget):
        EmulatedKernel.count += 1
        self.library = Path(directory().name) / f"kernel{EmulatedKernel.count}.so"
        linker = tvm.support.cc.cross_compiler(find_linker(target))
        executable.export_library(str(self.library), fcompile=linker)
        self.emulator = emulator(CPUS.get(target.families[0], "max"))

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        return self.emulator.call(self.library, list(arrays))
