"""An artifact directory: opened, checked in full, its parameters mapped and never copied.

A directory holds model.so, params.bin, config.json, tokenizer.json and artifact.json, which
describes the others (docs/architecture.md, "The artifact"). Every check that fails is an
`ArtifactError` of one line: what was asked, what was found, what is possible.
"""

import hashlib
import json
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime import host, tvm_runtime
from runtime.errors import ArtifactError

FORMAT = 1
MANIFEST = "artifact.json"
PAGE_BYTES = 4096  # every tensor starts on one
DTYPES = ("int8", "uint8", "int32", "int64", "float16", "float32")
FIELDS = {
    "model": str, "target": str, "cpu_flags": list, "kv_bits": list, "default_kv_bits": int,
    "context_length": int, "library": dict, "params": dict, "tensors": list, "files": dict,
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """What the runtime needs of config.json."""

    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]


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

    @classmethod
    def open(cls, directory: Path | str, *, verify: bool = True) -> "Artifact":
        """Open and check a directory; `verify=False` leaves out the hashes, not the sizes."""
        path = Path(directory)
        manifest = _read_manifest(path)
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
                _check_hash(path, name, _read(path, name), expected)
            _check_chunks(path, manifest["params"], memory)
        return cls(path, manifest, _read_shape(path), memory)

    @property
    def params_bytes(self) -> int:
        """Bytes of params.bin, all of them mapped."""
        return int(self.manifest["params"]["bytes"])

    def open_library(self) -> Any:
        """The compiled module, on the CPU."""
        return tvm_runtime.open_module((self.path / self.manifest["library"]["file"]).resolve())

    def parameters(self) -> Any:
        """The parameters as one argument of a compiled function; nothing is copied."""
        return tvm_runtime.group(tvm_runtime.share(array) for array in self.params.values())


def _read(path: Path, name: str) -> bytes:
    try:
        return (path / name).read_bytes()
    except OSError as error:
        raise ArtifactError(f"artifact {path}: cannot read {name}: {error.strerror}") from error


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(_read(path, name))
    except ValueError as error:  # UnicodeDecodeError is one too
        raise ArtifactError(f"artifact {path}: {name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"artifact {path}: {name} must hold a JSON object")
    return found


def _read_manifest(path: Path) -> dict[str, Any]:
    """artifact.json, its version, target kind and the types of its fields checked."""
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise ArtifactError(f"artifact: asked for {path}, which {what}")
    if not (path / MANIFEST).is_file():
        try:
            files = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
        except OSError as error:
            raise ArtifactError(f"artifact: cannot read {path}: {error.strerror}") from error
        raise ArtifactError(
            f"artifact: {path} is not an artifact: it has no {MANIFEST}, it holds {files}; "
            "possible: a directory written by python -m compiler.build"
        )
    manifest = _read_json(path, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"artifact {path}: format {manifest.get('format')!r}, this runtime reads {FORMAT}; "
            "possible: build it again"
        )
    for name, kind in FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            found = type(manifest[name]).__name__ if name in manifest else "nothing"
            raise ArtifactError(
                f"artifact {path}: {MANIFEST} needs {name!r} ({kind.__name__}), found {found}"
            )
    _check_target_kind(path, manifest.get("record"))
    return manifest


def _check_target_kind(path: Path, record: Any) -> None:
    target = record.get("tvm_target") if isinstance(record, dict) else None
    kind = target.get("kind", "llvm") if isinstance(target, dict) else "llvm"
    if kind != "llvm":
        raise ArtifactError(
            f"artifact {path}: built for TVM's {kind!r}; this runtime runs CPU artifacts ('llvm')"
        )


def _check_size(path: Path, entry: dict[str, Any]) -> None:
    if missing := sorted({"file", "bytes", "sha256"} - entry.keys()):
        raise ArtifactError(f"artifact {path}: {MANIFEST} lacks {', '.join(missing)} of a file")
    try:
        found = (path / entry["file"]).stat().st_size
    except OSError as error:
        raise ArtifactError(
            f"artifact {path}: cannot read {entry['file']}: {error.strerror}"
        ) from error
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
    step, expected = entry.get("chunk_bytes"), entry["sha256"]
    if not isinstance(step, int) or step < 1 or not isinstance(expected, list):
        raise ArtifactError(f"artifact {path}: {MANIFEST} lacks the params' chunk_bytes or sha256")
    starts = range(0, len(memory), step)
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
    try:
        name, dtype, shape = entry["name"], entry["dtype"], [int(size) for size in entry["shape"]]
        offset, nbytes = int(entry["offset"]), int(entry["bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"artifact {path}: {MANIFEST}: bad tensor {entry!r:.80}") from error
    if dtype not in DTYPES:
        raise ArtifactError(
            f"artifact {path}: tensor {name} is {dtype!r}; possible: {', '.join(DTYPES)}"
        )
    count = int(np.prod(shape, dtype=np.int64))
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


def _read_shape(path: Path) -> ModelShape:
    """The sizes in config.json, in Hugging Face's words."""
    config = _read_json(path, "config.json")

    def whole(name: str, default: Any = None) -> int:
        value = config.get(name) if config.get(name) is not None else default
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ArtifactError(
                f"artifact {path}: config.json needs {name} (a whole number), found {value!r}"
            )
        return value

    heads = whole("num_attention_heads")
    eos = config.get("eos_token_id")
    eos_ids: Sequence[Any] = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return ModelShape(
        layers=whole("num_hidden_layers"),
        kv_heads=whole("num_key_value_heads", heads),
        head_dim=whole("head_dim", 0) or whole("hidden_size") // max(heads, 1),
        vocab_size=whole("vocab_size"),
        bos_token_id=whole("bos_token_id"),
        eos_token_ids=tuple(int(token) for token in eos_ids),
    )
