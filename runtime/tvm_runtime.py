"""The one place that imports TVM: its 5 MB runtime, without the compiler and without torch.

`import tvm` alone costs 3.6 s of CPU and 384 MB, because it loads the compiler and, when it is
installed, torch. TVM_USE_RUNTIME_LIB=1 keeps out the first, a None in `sys.modules` the second;
0.75 s and 80 MB are left. A process that has loaded the whole of TVM before keeps it.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from runtime import device_code, host
from runtime.errors import ArtifactError, RuntimeRefusal

ALIGNMENT = 64  # bytes: what TVM's kernels assume of every tensor
THREADS = "TVM_NUM_THREADS"
ALL_BIG_CORES = 1  # `runtime.config_threadpool`'s affinity mode
_configured = threading.local()
_environment_lock = threading.Lock()


@functools.cache
def load() -> ModuleType:
    """The `tvm` package, imported the lean way unless the process has it already."""
    if "tvm" not in sys.modules:
        with _environment(TVM_USE_RUNTIME_LIB="1"), _without_torch():
            importlib.import_module("tvm")
    importlib.import_module("tvm.runtime.vm")
    device_code.install()
    return sys.modules["tvm"]


def load_cuda() -> Any:
    """TVM's first GPU. Its part of the runtime is a library of its own, which needs CUDA's.

    Raises ArtifactError where that library is not to be had: without a driver, for one.
    """
    tvm = load()
    if tvm.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is None:
        library = Path(str(tvm.__file__)).parent / "lib" / "libtvm_runtime_cuda.so"
        try:
            for cudart in _packaged_cudart():
                ctypes.CDLL(str(cudart), ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise ArtifactError(
                f"device: the artifact is for CUDA; cannot load {library.name}: {error}; possible: "
                "a host with an NVIDIA driver and CUDA 13's runtime (pip install "
                "nvidia-cuda-runtime), or a build with --target native"
            ) from error
    return tvm.cuda(0)


def _packaged_cudart() -> list[Path]:
    """CUDA's runtime as pip installs it, which the loader would not find by itself."""
    found = importlib.util.find_spec("nvidia")
    places = found.submodule_search_locations if found else None
    return [path for place in places or () for path in Path(place).glob("cu13/lib/libcudart.so.13")]


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for a while; children started later do not see them."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tvm_ffi imports torch where it can; a None in `sys.modules` makes that import fail."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def use_threads(count: int) -> None:
    """Let kernels called from this thread use `count` threads, this one included.

    TVM reads TVM_NUM_THREADS at every launch: unset, it counts the CPUs anew (some 10 us) and takes
    half of them, whatever the pool was configured for. So it stays set, for the whole process.
    TVM keeps a pool for each calling thread, so this is checked before every call and costs
    nothing when it holds. A pool never grows: it is made for every usable CPU, then narrowed.
    TVM pins threads to CPUs unless told otherwise, the caller among them, which starves whoever
    else runs here: off, unless TVM_BIND_THREADS is set by the user.
    """
    asked = str(count)
    if getattr(_configured, "count", None) == count and os.environ.get(THREADS) == asked:
        return
    tvm = load()
    bind = os.environ.get("TVM_BIND_THREADS", "0")
    most = str(max(count, host.usable_cpus()))
    with _environment(TVM_NUM_THREADS=most, TVM_BIND_THREADS=bind):
        tvm.get_global_func("runtime.config_threadpool")(ALL_BIG_CORES, count)
    os.environ[THREADS] = asked
    found = tvm.runtime.num_threads()
    if found != count:
        raise RuntimeRefusal(
            f"threads: asked for {count}; TVM's pool of this thread was started before with "
            f"{found} and does not grow; possible: 1 to {found}"
        )
    _configured.count = count


def open_module(library: Path, device: Any) -> Any:
    """The Relax virtual machine of a compiled module, its kernels on TVM's `device`."""
    tvm = load()
    try:
        module = tvm.runtime.load_module(str(library))
        return tvm.runtime.vm.VirtualMachine(module, device)
    except (RuntimeError, OSError, AttributeError) as error:  # tvm raises all three
        reason = " ".join(str(error).split())[-200:]
        raise ArtifactError(
            f"artifact: cannot load {library} on this {host.machine()} host: {reason}"
        ) from error


def function_or_none(module: Any, name: str) -> Any | None:
    """A function of a module opened by `open_module`; None where it has none of that name."""
    try:
        return module[name]
    except AttributeError:
        return None


def fill_pool(module: Any, name: str, arguments: list[Any]) -> None:
    """Leave in TVM's pool what the capture of a step takes from it: nothing is allocated meanwhile.

    A capture holds the result of a first run of its own: two are wanted. The cache is written as
    the step itself will write it.
    """
    step = function_or_none(module, f"{name}_step")
    _held = [step(*arguments) for _ in range(2)] if step else []


def share(array: np.ndarray) -> Any:
    """A TVM tensor over the memory of a writeable, 64-byte aligned array: nothing is copied."""
    assert array.ctypes.data % ALIGNMENT == 0 and array.flags.writeable
    return load().runtime.from_dlpack(array)


def copy(array: np.ndarray) -> Any:
    """A TVM tensor with a copy of the array; `runtime.tensor` takes five times as long."""
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    aligned = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    return load().runtime.from_dlpack(aligned)


def group(tensors: Iterable[Any]) -> Any:
    """Tensors as the one object a Relax tuple argument is, converted once and not at each call."""
    load()
    return importlib.import_module("tvm_ffi").convert(tuple(tensors))


def view(tensor: Any) -> np.ndarray:
    """A numpy array over a TVM tensor's memory, which lives as long as the array."""
    return np.from_dlpack(tensor)


def free_unused_memory() -> None:
    """Give back what TVM's pools hold for later calls.

    They keep one buffer for every size they ever saw, and every prompt length brings new sizes.
    """
    load().get_global_func("vm.builtin.memory_manager.clear")()
