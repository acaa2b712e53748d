"""The one place that loads TVM: its 5 MB runtime library and tvm_ffi, the Python beside it.

The package `tvm` is not imported: with its compiler it costs 3.6 s of CPU and 384 MB, in its lean
form 0.6 s and 57 MB, tvm_ffi and the library alone 0.15 s and 21 MB. A process that has imported
`tvm`, before or after, shares the library with it.
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import itertools
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime import device_code, host
from runtime.errors import ArtifactError, RuntimeRefusal

ALIGNMENT = 64  # bytes: what TVM's kernels assume of every tensor
THREADS = "TVM_NUM_THREADS"
ALL_BIG_CORES = 1  # `runtime.config_threadpool`'s affinity mode
CUDA_HOST = 3  # of DLPack's device types: memory of the host that is page-locked
POOLED = 2  # the virtual machine's allocator that keeps what it frees
_configured = threading.local()
_environment_lock = threading.Lock()
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


@functools.cache
def load() -> Any:
    """The `tvm_ffi` package, with TVM's runtime in the process."""
    with _without_torch():
        tvm_ffi = importlib.import_module("tvm_ffi")
    _load_library("tvm_runtime")
    device_code.install()
    return tvm_ffi


def _load_library(name: str) -> None:
    """One of TVM's libraries, its symbols for all. Raises OSError, RuntimeError."""
    package = importlib.util.find_spec("tvm")  # imports nothing
    found = package.submodule_search_locations if package else None
    places = [Path(place) / "lib" for place in found or ()]
    if path := os.environ.get("TVM_LIBRARY_PATH"):
        places.insert(0, Path(path))
    libinfo = importlib.import_module("tvm_ffi.libinfo")
    libinfo.load_lib_ctypes("tvm", name, "RTLD_GLOBAL", extra_lib_paths=places)


def function(name: str) -> Any:
    """One of TVM's global functions."""
    return load().get_global_func(name)


def cpu() -> Any:
    return load().device("cpu", 0)


class Gpu:
    """The first GPU: facts, and tensors that are copied there and back."""

    def __init__(self) -> None:
        self.device = load().device("cuda", 0)

    @property
    def exists(self) -> bool:
        return self._attribute(0) != 0

    @property
    def compute_version(self) -> str:
        """Such as '9.0'."""
        return self._attribute(4)

    @property
    def available_memory(self) -> int | None:
        """Bytes; None where the driver does not tell."""
        return self._attribute(15)

    def _attribute(self, number: int) -> Any:
        """number: of TVM's DeviceAttrKind."""
        kind = self.device.dlpack_device_type()
        return function("runtime.GetDeviceAttr")(kind, self.device.index, number)

    def tensor(self, array: np.ndarray) -> Any:
        tvm_ffi = load()
        shape, dtype = tvm_ffi.Shape(array.shape), tvm_ffi.dtype(str(array.dtype))
        tensor = function("runtime.TVMTensorAllocWithScope")(shape, dtype, self.device, None)
        self.write(tensor, array)
        return tensor

    def write(self, tensor: Any, array: np.ndarray) -> None:
        """array: of the tensor's shape and dtype. Waits until it is copied."""
        source = np.ascontiguousarray(array)
        function("runtime.TVMTensorCopyFromBytes")(tensor, address(source), source.nbytes)

    def read(self, tensor: Any) -> np.ndarray:
        """A copy, once the GPU has come that far."""
        array = np.empty(tensor.shape, str(tensor.dtype))
        function("runtime.TVMTensorCopyToBytes")(tensor, address(array), array.nbytes)
        return array

    def page_locked(self, count: int) -> tuple[np.ndarray, Any]:
        """`count` int64 of the host that the GPU can address: an array, and the same memory as a
        tensor of the GPU, for whose kernels it is like any other. RuntimeError: none was granted.
        """
        tvm_ffi = load()
        shape, dtype = tvm_ffi.Shape([count]), tvm_ffi.dtype("int64")
        place = tvm_ffi.device(CUDA_HOST, self.device.index)
        tensor = function("runtime.TVMTensorAllocWithScope")(shape, dtype, place, None)
        capsule = tensor.__dlpack__()
        head = _Head.from_address(_pointer_of(capsule, b"dltensor"))
        room = (ctypes.c_int64 * count).from_address(head.data)
        head.device_type = self.device.dlpack_device_type()
        alias = tvm_ffi.from_dlpack(capsule)  # keeps the memory
        room.alias = alias  # type: ignore[attr-defined]
        array = np.frombuffer(memoryview(room), np.int64)
        array[:] = 0
        return array, alias

    def wait(self) -> None:
        """Until all that was launched has ended. RuntimeError tells what went wrong in it."""
        function("runtime.Device_StreamSync")(self.device, 0)


class _Head(ctypes.Structure):
    """Of a DLManagedTensor, as DLPack lays it out."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
    )


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def load_cuda() -> Gpu:
    """TVM's first GPU. Its part of the runtime is a library of its own, which needs CUDA's.

    Raises ArtifactError where that library is not to be had: without a driver, for one.
    """
    if load().get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is None:
        try:
            for cudart in _packaged_cudart():
                ctypes.CDLL(str(cudart), ctypes.RTLD_GLOBAL)
            _load_library("tvm_runtime_cuda")
        except (OSError, RuntimeError) as error:
            raise ArtifactError(
                f"device: the artifact is for CUDA; cannot load libtvm_runtime_cuda.so: {error}; "
                "possible: a host with an NVIDIA driver and CUDA 13's runtime (pip install "
                "nvidia-cuda-runtime), or a build with --target native"
            ) from error
    return Gpu()


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
    bind = os.environ.get("TVM_BIND_THREADS", "0")
    most = str(max(count, host.usable_cpus()))
    with _environment(TVM_NUM_THREADS=most, TVM_BIND_THREADS=bind):
        function("runtime.config_threadpool")(ALL_BIG_CORES, count)
    os.environ[THREADS] = asked
    found = num_threads()
    if found != count:
        raise RuntimeRefusal(
            f"threads: asked for {count}; TVM's pool of this thread was started before with "
            f"{found} and does not grow; possible: 1 to {found}"
        )
    _configured.count = count


def num_threads() -> int:
    """That kernels called from this thread use."""
    return function("runtime.NumThreads")()


def open_module(library: Path, device: Any) -> Any:
    """The Relax virtual machine of a compiled module, its kernels on TVM's `device`."""
    devices = dict.fromkeys([device, cpu()])  # shapes are the CPU's
    try:
        machine = load().load_module(str(library))["vm_load_executable"]()
        places = [(d.dlpack_device_type(), d.index, POOLED) for d in devices]
        machine["vm_initialization"](*itertools.chain.from_iterable(places))
        return machine
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
    return load().from_dlpack(array)


def copy(array: np.ndarray) -> Any:
    """A TVM tensor with a copy of the array; `runtime.tensor` takes five times as long."""
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    aligned = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    return load().from_dlpack(aligned)


def group(tensors: Iterable[Any]) -> Any:
    """Tensors as the one object a Relax tuple argument is, converted once and not at each call."""
    return load().convert(tuple(tensors))


def view(tensor: Any) -> np.ndarray:
    """A numpy array over a TVM tensor's memory, which lives as long as the array."""
    return np.from_dlpack(tensor)


def free_unused_memory() -> None:
    """Give back what TVM's pools hold for later calls.

    They keep one buffer for every size they ever saw, and every prompt length brings new sizes.
    """
    function("vm.builtin.memory_manager.clear")()
