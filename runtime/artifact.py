"""An artifact directory: opened, checked in full, its parameters mapped and never copied.

A directory holds model.so, params.bin, config.json, tokenizer.json and artifact.json, which
describes the others (docs/architecture.md, "The artifact"). Every check that fails is an
`ArtifactError` of one line: what was asked, what was found, what is possible.
"""

import hashlib
import math
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from runtime import host, tvm_runtime
from runtime.device import Device
from runtime.errors import ArtifactError
from runtime.manifest import MANIFEST, ModelShape, read_file, read_manifest, read_shape

PAGE_BYTES = 4096  # every tensor starts on one
DTYPES = ("int8", "uint8", "int32", "int64", "float16", "float32")


class Artifact:
    """An open artifact: what its manifest says, and its parameters.

    `params` maps each name to a numpy array over params.bin, in the manifest's order. The mapping
    is private: no array may be written, and the file may be deleted but not written meanwhile.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], shape: ModelShape, memory: mmap.mmap):
        self.path = path
        self.manifest = manifest
        self.shape = shape
        self.model: str = manifest["model"]
        self.target: str = manifest["target"]
        self.kv_bits: tuple[int, ...] = tuple(manifest["kv_bits"])
        self.default_kv_bits: int = manifest["default_kv_bits"]
        self.context_length: int = manifest["context_length"]
        self.params = {t["name"]: _tensor(path, t, memory) for t in manifest["tensors"]}
        angles = self.params.get("rope.cos")  # kernels read its row of every position, unchecked
        if angles is not None and self.context_length > len(angles):
            raise ArtifactError(
                f"artifact {path}: context_length is {self.context_length}, its rope.cos has "
                f"{len(angles)} positions; possible: build it again"
            )

    @classmethod
    def open(cls, directory: Path | str, *, verify: bool = True) -> "Artifact":
        """Open and check a directory; `verify=False` leaves out the hashes, not the sizes."""
        path = Path(directory)
        manifest = read_manifest(path)
        if manifest["machine"] != host.machine():
            raise ArtifactError(
                f"artifact {path}: target {manifest['target']!r} is for {manifest['machine']} "
                f"hosts, this one is {host.machine()}; possible: build with --target native here"
            )
        if missing := host.missing_cpu_flags(manifest["cpu_flags"]):
            raise ArtifactError(
                f"artifact {path}: target {manifest['target']!r} needs the CPU flags "
                f"{' '.join(missing)}, which this {host.machine()} host lacks; possible: build "
                "with --target native on this host"
            )
        _check_size(path, manifest["library"])
        _check_size(path, manifest["params"])
        memory = _map(path / manifest["params"]["file"])
        if verify:
            library = manifest["library"]
            small = {**manifest["files"], library["file"]: library["sha256"]}
            for name, expected in small.items():
                _check_hash(path, name, read_file(path, name), expected)
            _check_chunks(path, manifest["params"], memory)
        return cls(path, manifest, read_shape(path), memory)

    @property
    def params_bytes(self) -> int:
        """Bytes of params.bin, all of them mapped."""
        return int(self.manifest["params"]["bytes"])

    def step_bytes(self, kv_bits: int, slots: int, context: int) -> dict[str, int]:
        """Bytes by part that steps take beside parameters and cache, where that is known."""
        parts = {"activations": int(self.manifest.get("workspace_bytes", 0))}
        levels = self.manifest.get("levels", {}).get(str(kv_bits), {"positions": 1, "bytes": 0})
        blocks = slots * -(-context // levels["positions"])
        if unpacked := blocks * levels["bytes"]:
            parts["unpacked levels"] = unpacked
        return parts

    def open_library(self, device: Device) -> Any:
        """The compiled module."""
        library = (self.path / self.manifest["library"]["file"]).resolve()
        return tvm_runtime.open_module(library, device.handle)

    def parameters(self, device: Device) -> Any:
        """The parameters as one argument of a compiled function; on a CPU nothing is copied."""
        return tvm_runtime.group(device.place(self.params.values()))


def _check_size(path: Path, entry: dict[str, Any]) -> None:
    try:
        found = (path / entry["file"]).stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"artifact {path}: cannot read {entry['file']}: {reason}") from error
    if found != entry["bytes"]:
        raise ArtifactError(
            f"artifact {path}: {entry['file']} has {found} bytes, {MANIFEST} says "
            f"{entry['bytes']}; possible: copy or build it again"
        )


def _check_hash(path: Path, what: str, data: bytes | memoryview, expected: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ArtifactError(
            f"artifact {path}: {what} is damaged: sha256 {found[:12]}, {MANIFEST} says "
            f"{str(expected)[:12]}; possible: copy or build it again"
        )


def _map(file: Path) -> mmap.mmap:
    """The file's bytes, mapped privately: DLPack refuses memory that is read-only."""
    with file.open("rb") as opened:
        try:
            memory = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise ArtifactError(f"artifact: cannot map {file}: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:  # fewer TLB misses where the file system has large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them; the mapping works as it is
    return memory


def _check_chunks(path: Path, entry: dict[str, Any], memory: mmap.mmap) -> None:
    """Hash params.bin in chunks, on every CPU: hashlib lets go of the interpreter's lock."""
    step, expected = entry["chunk_bytes"], entry["sha256"]
    starts = range(0, len(memory), max(step, 1))
    if len(expected) != len(starts):
        raise ArtifactError(
            f"artifact {path}: {MANIFEST} has {len(expected)} hashes of params for {len(starts)} "
            f"chunks of {step} bytes; possible: build it again"
        )
    whole = memoryview(memory)

    def check(chunk: tuple[int, str]) -> None:
        start, sha256 = chunk
        what = f"{entry['file']} from byte {start}"
        with whole[start : start + step] as data:
            _check_hash(path, what, data, sha256)

    with ThreadPoolExecutor(host.usable_cpus()) as pool:
        for _ in pool.map(check, zip(starts, expected, strict=True)):
            pass


def _tensor(path: Path, entry: dict[str, Any], memory: mmap.mmap) -> np.ndarray:
    """One parameter, as an array over the mapping."""
    name, dtype, shape = entry["name"], entry["dtype"], entry["shape"]
    offset, nbytes = entry["offset"], entry["bytes"]
    if dtype not in DTYPES:
        raise ArtifactError(
            f"artifact {path}: tensor {name} is {dtype!r}; possible: {', '.join(DTYPES)}"
        )
    count = math.prod(shape)
    fits = (
        min([0, *shape]) == 0 <= offset
        and offset + nbytes <= len(memory)
        and offset % PAGE_BYTES == 0
    )
    if not fits or count * np.dtype(dtype).itemsize != nbytes:
        raise ArtifactError(
            f"artifact {path}: tensor {name} {dtype} {shape} does not fit {nbytes} bytes at offset "
            f"{offset} of {len(memory)}; offsets are multiples of {PAGE_BYTES}"
        )
    return np.frombuffer(memory, dtype, count, offset).reshape(shape)
