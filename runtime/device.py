"""Devices: where parameters, caches and a step's tensors lie, and how arrays get there and back.

device | parameters           | a step's inputs               | its result
cpu    | mapped, shared       | aligned copies; a decode      | a view
       |                      | step's are written into again |
cuda   | copied once, at load | written into the same tensors | copied back
       |                      | at every call: a captured     |
       |                      | graph knows their addresses   |

A step that draws its token (`decode_token`) has neither: runtime/mailbox.py.
"""

import math
import mmap
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from runtime import host, tvm_runtime
from runtime.errors import ArtifactError, RuntimeRefusal
from runtime.mailbox import Mailbox

PAGE_BYTES = 4096
REASON = 200  # characters of what TVM says that are passed on
DECODE_STEPS = ("decode", "decode_one")  # on a GPU captured (compiler/passes/capture_decode.py)
Wanted = Sequence[tuple[np.dtype, tuple[int, ...]]]  # dtype and shape of each tensor


def failed_step(error: object) -> str:
    """A refusal, where the device says so and no more."""
    return (
        f"device: a step did not end well: {shortened(error)}; possible: to load the model again, "
        "in a new process"
    )


def shortened(error: object) -> str:
    """The end of what TVM says, in one line."""
    return " ".join(str(error).split())[-REASON:]


class Device(Protocol):
    handle: Any  # TVM's device

    def require(self, parts: dict[str, int]) -> None:
        """Refuse what does not fit, with the bytes of each part."""

    def place(self, arrays: Iterable[np.ndarray]) -> list[Any]:
        """Parameters, as tensors that stay."""

    def zeros(self, wanted: Wanted) -> list[Any]:
        """Zeroed tensors that stay."""

    def inputs(self, step: str, arrays: Sequence[np.ndarray]) -> list[Any]:
        """Tensors with these values for one call of `step`."""

    def mailbox(self) -> Mailbox | None:
        """For steps that draw their token; None where the host does. Raises `RuntimeRefusal`."""

    @property
    def takes_memory_at_once(self) -> bool:
        """Whether first steps take memory of constant size, which later ones find there."""

    def fetch(self, tensor: Any) -> np.ndarray:
        """A tensor's values, valid until the next step."""

    def end_prompt(self) -> None:
        """Called when the row count is about to change for good."""

    def why(self, reason: str) -> str | None:
        """A refusal for what TVM said of a step, if the device is the reason."""


class Cpu:
    def __init__(self) -> None:
        self.handle = tvm_runtime.cpu()
        self._inputs: dict[tuple, Inputs] = {}  # of decode steps, by step and rows

    def require(self, parts: dict[str, int]) -> None:
        """The system grants pages as they are written; `zeros` refuses what it will not map."""

    def place(self, arrays: Iterable[np.ndarray]) -> list[Any]:
        return [tvm_runtime.share(array) for array in arrays]

    def zeros(self, wanted: Wanted) -> list[Any]:
        """In one anonymous mapping, each tensor on a page of its own."""
        sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in wanted]
        padded = [-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes]
        try:
            memory = mmap.mmap(-1, sum(padded), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise RuntimeRefusal(
                f"KV cache: asked for {sum(padded)} bytes, the system says: {error}; possible: "
                "fewer slots, a shorter context, fewer kv-bits"
            ) from error
        tensors, offset = [], 0
        for (dtype, shape), size, room in zip(wanted, sizes, padded, strict=True):
            flat = np.frombuffer(memory, dtype, size // dtype.itemsize, offset)
            tensors.append(tvm_runtime.share(flat.reshape(shape)))
            offset += room
        return tensors

    def inputs(self, step: str, arrays: Sequence[np.ndarray]) -> list[Any]:
        """Those of decode steps stay: to make three tensors takes 70 us."""
        if step not in DECODE_STEPS:
            return [tvm_runtime.copy(array) for array in arrays]
        held = self._inputs.get(rows := (step, *row_counts(arrays)))
        if held is None:
            tensors = [tvm_runtime.copy(array) for array in arrays]
            self._inputs[rows] = Inputs(tensors, [tvm_runtime.view(tensor) for tensor in tensors])
            return tensors
        for value, array in zip(held.values, arrays, strict=True):
            value[...] = array
        return held.tensors

    def mailbox(self) -> None:
        return None

    @property
    def takes_memory_at_once(self) -> bool:
        return False

    def fetch(self, tensor: Any) -> np.ndarray:
        return tvm_runtime.view(tensor)

    def end_prompt(self) -> None:
        tvm_runtime.free_unused_memory()

    def why(self, reason: str) -> str | None:
        return None


class Cuda:
    """The first GPU. Refuses where there is none, or none that the library was built for."""

    def __init__(self, archs: Sequence[str]) -> None:
        self._gpu = tvm_runtime.load_cuda()
        if not self._gpu.exists:
            raise ArtifactError(
                "device: the artifact is for CUDA; found no GPU or no driver on this "
                f"{host.machine()} host; possible: a host where nvidia-smi lists a GPU, or a "
                "build with --target native"
            )
        capability = str(self._gpu.compute_version)
        if not any(runs_on(arch, capability, arch == archs[-1]) for arch in archs):
            raise ArtifactError(
                f"device: the library was built for {', '.join(archs)}; found a GPU of compute "
                f"capability {capability}; possible: build with --target cuda on this host"
            )
        self.handle = self._gpu.device
        self._inputs: dict[str, dict[tuple, Inputs]] = {}  # of a step, by the rows
        self._parts: dict[str, int] = {}
        self._taken = 0  # bytes of tensors that stay

    def require(self, parts: dict[str, int]) -> None:
        self._parts = dict(parts)
        free = self._free()
        if free is not None and sum(parts.values()) > free:
            raise RuntimeRefusal(self._too_little())

    def _free(self) -> int | None:
        """Bytes, beside what this process took; None where the driver does not tell."""
        try:
            return self._gpu.available_memory
        except RuntimeError as error:  # the driver's own share, without which it tells nothing
            if is_out_of_memory(str(error)):
                return 0
            raise ArtifactError(f"device: the GPU cannot be used: {shortened(error)}") from error

    def _too_little(self) -> str:
        free = self._free()
        needs = ", ".join(f"{name} {host.show_bytes(size)}" for name, size in self._parts.items())
        taken = f" beside {host.show_bytes(self._taken)} of them" if self._taken else ""
        return (
            f"GPU memory: {host.show_bytes(sum(self._parts.values()))} needed ({needs}), "
            f"{'an unknown part' if free is None else host.show_bytes(free)} free{taken}; "
            "possible: fewer slots, a shorter context, fewer kv-bits, or to end what else runs on "
            "the GPU"
        )

    def place(self, arrays: Iterable[np.ndarray]) -> list[Any]:
        return [self._tensor(array, stays=True) for array in arrays]

    def _tensor(self, array: np.ndarray, stays: bool) -> Any:
        try:
            tensor = self._gpu.tensor(array)
        except (RuntimeError, MemoryError) as error:  # another process was quicker
            refusal = self.why(str(error))
            reason = f"device: cannot place a tensor on the GPU: {shortened(error)}"
            raise RuntimeRefusal(refusal or reason) from error
        self._taken += array.nbytes if stays else 0
        return tensor

    def zeros(self, wanted: Wanted) -> list[Any]:
        return self.place(np.zeros(shape, dtype) for dtype, shape in wanted)

    def inputs(self, step: str, arrays: Sequence[np.ndarray]) -> list[Any]:
        """Those of a captured step stay, for every row count; of others, those of the last call."""
        known, rows = self._inputs.setdefault(step, {}), row_counts(arrays)
        if rows not in known:
            if step not in DECODE_STEPS:
                known.clear()
            known[rows] = Inputs([self._tensor(array, stays=False) for array in arrays])
        else:
            held = known[rows]
            for tensor, array, old in zip(held.tensors, arrays, held.values, strict=True):
                if not np.array_equal(array, old):  # a copy waits for the GPU
                    self._gpu.write(tensor, array)
        known[rows].values = [array.copy() for array in arrays]
        return known[rows].tensors

    def mailbox(self) -> Mailbox:
        try:
            return Mailbox(self._gpu)
        except (RuntimeError, MemoryError) as error:
            raise RuntimeRefusal(
                f"device: asked for a page of memory that the GPU may read: {shortened(error)}; "
                "possible: to end what else runs on this host"
            ) from error

    @property
    def takes_memory_at_once(self) -> bool:
        return True

    def fetch(self, tensor: Any) -> np.ndarray:
        return self._gpu.read(tensor)

    def end_prompt(self) -> None:
        """What the pool holds is of constant size (compiler/passes/bound_rows.py) and stays."""

    def why(self, reason: str) -> str | None:
        if is_out_of_memory(reason):
            return self._too_little()
        if "captur" in reason.lower():
            return (
                "decode: the step cannot be captured as a CUDA graph, because its pool of memory "
                f"had to grow meanwhile: {shortened(reason)}; possible: build it again"
            )
        return failed_step(reason) if re.search(r"cuda(error|_error|: )", reason, re.I) else None


@dataclass
class Inputs:
    """Of a step, for one number of rows."""

    tensors: list[Any]
    values: list[np.ndarray] = field(default_factory=list)  # what they hold


def row_counts(arrays: Sequence[np.ndarray]) -> tuple[int, ...]:
    return tuple(map(len, arrays))


def is_out_of_memory(reason: str) -> bool:
    """Whether TVM says so: as CUDA's runtime, or by the name of the driver's error."""
    return "out of memory" in reason.lower().replace("_", " ")


def runs_on(arch: str, capability: str, has_ptx: bool) -> bool:
    """Whether code for `sm_90` runs on a GPU of compute capability `9.0`.

    Machine code serves later minor versions, PTX all later ones, a letter (sm_90a) that chip only.
    """
    digits = arch.removeprefix("sm_")
    found = tuple(map(int, capability.split(".")))
    if not digits.isdigit():
        return (int(digits[:-2]), int(digits[-2])) == found
    built = (int(digits[:-1]), int(digits[-1]))
    return (built[0] == found[0] and built <= found) or (has_ptx and built <= found)


def open_device(manifest: dict[str, Any]) -> Device:
    """The device that an artifact was built for."""
    if manifest["device"] == "cpu":
        return Cpu()
    if manifest["device"] == "cuda":
        return Cuda(manifest.get("archs") or ["unknown"])
    raise ArtifactError(f"device: the artifact is for {manifest['device']!r}; possible: cpu, cuda")
