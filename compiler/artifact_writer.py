"""Write an artifact directory (docs/architecture.md, "The artifact"), whole or not at all.

Files are written into a temporary directory beside the destination, which takes the place of an
older artifact by renaming once everything is on the disk.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tvm
from tokenizers import Tokenizer
from tvm import relax

from compiler.config import BuildError
from compiler.replacing import taking_the_place_of
from model.config import ModelConfig
from schedules.layouts import LAYOUTS

FORMAT = 2
MANIFEST = "artifact.json"
LIBRARY, PARAMS, TOKENIZER = "model.so", "params.bin", "tokenizer.json"
FILES = {MANIFEST, LIBRARY, PARAMS, TOKENIZER, "config.json"}
PAGE_BYTES = 4096  # a tensor starts on a page, so that it can be mapped
CHUNK_BYTES = 64 * 2**20  # the unit in which params.bin is hashed, in parallel when it is read


@dataclass(frozen=True)
class Parameter:
    """One parameter of the compiled functions."""

    name: str
    dtype: str
    shape: tuple[int, ...]  # as the functions take it, that is, packed
    layout: str | None


@contextmanager
def replacing(destination: Path) -> Iterator[Path]:
    """A new directory that becomes `destination` when the block ends without an exception."""
    destination = destination.resolve()  # a link stays; what it points at is replaced
    if destination.exists() and (problem := why_kept(destination)):
        raise BuildError(
            f"output: {destination} exists and {problem}; "
            "possible: a new path, an empty directory or an older artifact"
        )
    new = make_beside(destination)
    with taking_the_place_of(destination, new):
        yield new


def make_beside(destination: Path) -> Path:
    """A directory on the same file system, hidden, from which a rename is one step."""
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".new", dir=parent))
    except OSError as error:
        raise BuildError(
            f"output: asked for {destination}, cannot write in {parent} ({error.strerror}); "
            "possible: a directory that can be written"
        ) from error


def why_kept(path: Path) -> str | None:
    """Why `path` must not be replaced; None for an empty directory and for a bare artifact."""
    if path == Path.cwd():
        return "is the working directory"
    found = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if not path.is_dir() or (found and MANIFEST not in found):
        return "is no artifact"
    others = sorted(found - FILES)
    return f"holds {', '.join(others[:3])} besides an artifact" if others else None


def parameters_of(mod: tvm.IRModule) -> list[Parameter]:
    """The fields of the argument `params`, which all functions share, in their order."""
    func = next(func for _, func in mod.functions_items() if isinstance(func, relax.Function))
    fields = func.params[-1].ty.fields
    layouts = mod.attrs["layouts"]
    return [
        Parameter(str(name), str(field.dtype), tuple(map(int, field.shape)), layouts.get(name))
        for name, field in zip(mod.attrs["param_names"], fields, strict=True)
    ]


def write_params(
    directory: Path,
    parameters: Sequence[Parameter],
    read: Callable[[str], np.ndarray],
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, object]:
    """Pack and write params.bin, one tensor in memory at a time; its part of artifact.json."""
    tensors = []
    with (directory / PARAMS).open("wb") as file:
        writer = _HashingWriter(file)
        for parameter in parameters:
            array = read(parameter.name)
            if parameter.layout:
                array = LAYOUTS[parameter.layout].pack(array)
            _check(parameter, array)
            writer.write(b"\0" * (-writer.bytes % PAGE_BYTES))
            tensors.append(_describe(parameter) | {"offset": writer.bytes, "bytes": array.nbytes})
            writer.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            advance(1 / len(parameters))
        _flush(file)
    params = {"file": PARAMS, "bytes": writer.bytes, "chunk_bytes": CHUNK_BYTES}
    return {"params": params | {"sha256": writer.finish()}, "tensors": tensors}


def require_tokenizer(source: Path, vocab_size: int) -> None:
    """Of a checkpoint, if it has one: what the runtime would refuse. Raises `BuildError`."""
    path = source / TOKENIZER
    if not path.is_file():
        return
    possible = "possible: the model's own, or none"
    try:
        found = Tokenizer.from_file(str(path)).get_vocab_size()
    except Exception as error:  # tokenizers raises Exception itself
        raise BuildError(f"checkpoint: {path} is no tokenizer: {error}; {possible}") from error
    if found > vocab_size:
        raise BuildError(
            f"checkpoint: {path} has {found} tokens, config.json {vocab_size}; {possible}"
        )


def copy_model_files(directory: Path, config: ModelConfig, source: Path) -> list[str]:
    """config.json with every field spelt out, and the tokenizer if the checkpoint has one."""
    config.save(directory)
    files = ["config.json"]
    if (source / TOKENIZER).is_file():
        shutil.copyfile(source / TOKENIZER, directory / TOKENIZER)
        files.append(TOKENIZER)
    return files


def write_manifest(directory: Path, facts: Mapping[str, object], files: Sequence[str]) -> None:
    """artifact.json, written last; hashes the library and `files` as they lie in `directory`."""
    library = directory / LIBRARY
    manifest = {
        "format": FORMAT,
        **facts,
        "library": {"file": LIBRARY, "bytes": library.stat().st_size, "sha256": sha256(library)},
        "files": {name: sha256(directory / name) for name in files},
    }
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(to_lines(manifest) + "\n")
        _flush(file)


def to_lines(value: object, depth: int = 0) -> str:
    """JSON to be read: objects are spread over lines, those that lists hold take a line each."""
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict) and depth < 2 and value:
        items = [f"{json.dumps(key)}: {to_lines(item, depth + 1)}" for key, item in value.items()]
        return "{" + inner + ("," + inner).join(items) + outer + "}"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + inner + ("," + inner).join(map(json.dumps, value)) + outer + "]"
    return json.dumps(value)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(parameter: Parameter) -> dict[str, object]:
    return {
        "name": parameter.name,
        "dtype": parameter.dtype,
        "shape": list(parameter.shape),
        "layout": parameter.layout,
    }


def _check(parameter: Parameter, array: np.ndarray) -> None:
    if (str(array.dtype), array.shape) != (parameter.dtype, parameter.shape):
        raise BuildError(
            f"{parameter.name} of the checkpoint is {array.dtype} {array.shape}, "
            f"expected {parameter.dtype} {parameter.shape}"
        )


def _flush(file) -> None:
    """A full disk is noticed here, and not by whoever reads the artifact."""
    file.flush()
    os.fsync(file.fileno())


class _HashingWriter:
    """Writes bytes and hashes them by chunks of CHUNK_BYTES."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = 0
        self._hashes: list[str] = []
        self._chunk = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        view = memoryview(data)
        while len(view):
            room = CHUNK_BYTES - self.bytes % CHUNK_BYTES
            self._chunk.update(view[:room])
            self.bytes += len(view[:room])
            view = view[room:]
            if self.bytes % CHUNK_BYTES == 0:
                self._end_chunk()

    def _end_chunk(self) -> None:
        self._hashes.append(self._chunk.hexdigest())
        self._chunk = hashlib.sha256()

    def finish(self) -> list[str]:
        if self.bytes % CHUNK_BYTES:
            self._end_chunk()
        return self._hashes
