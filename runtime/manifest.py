"""artifact.json and config.json: read, and every field that the runtime uses checked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import ArtifactError

FORMAT = 2
MANIFEST, CONFIG = "artifact.json", "config.json"
LARGEST = 1 << 31  # bounds the sizes in config.json
COUNT, SIZE = range(1, 1 << 48), range(1 << 48)

# A type, whole numbers, a list of one element's schema, or an object's fields; None stands for any
# name.
Schema = type | range | list["Schema"] | dict[str | None, "Schema"]
SCHEMA: dict[str | None, Schema] = {
    "model": str,
    "target": str,
    "device": str,
    "machine": str,
    "cpu_flags": [str],
    "kv_bits": [int],
    "default_kv_bits": int,
    "context_length": int,
    "library": {"file": str, "bytes": int, "sha256": str},
    "params": {"file": str, "bytes": int, "chunk_bytes": int, "sha256": [str]},
    "tensors": [{"name": str, "dtype": str, "shape": [int], "offset": int, "bytes": int}],
    "files": {None: str},
}
OPTIONAL: dict[str | None, Schema] = {
    "prompt_rows": COUNT,
    "workspace_bytes": SIZE,
    "levels": {None: {"positions": COUNT, "bytes": SIZE}},
}


@dataclass(frozen=True)
class ModelShape:
    """What the runtime needs of config.json."""

    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    bos_token_id: int
    eos_token_ids: tuple[int, ...]


def read_manifest(path: Path) -> dict[str, Any]:
    """artifact.json: its version and the types of its fields."""
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise ArtifactError(
            f"artifact: asked for {path}, which {what}; possible: a directory written by "
            "python -m compiler.build"
        )
    if not (path / MANIFEST).is_file():
        raise ArtifactError(
            f"artifact: {path} is not an artifact: it has no {MANIFEST}, it holds "
            f"{_list(path)}; possible: a directory written by python -m compiler.build"
        )
    manifest = read_json(path, MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"artifact {path}: format {manifest.get('format')!r}, this runtime reads {FORMAT}; "
            "possible: build it again"
        )
    there: dict[str | None, Schema] = {
        name: schema for name, schema in OPTIONAL.items() if name in manifest
    }
    if problem := _mismatch(manifest, SCHEMA | there, ""):
        raise ArtifactError(f"artifact {path}: {MANIFEST} needs {problem}")
    if manifest["default_kv_bits"] not in manifest["kv_bits"]:
        raise ArtifactError(
            f"artifact {path}: {MANIFEST} has default_kv_bits {manifest['default_kv_bits']}, which "
            f"its kv_bits {manifest['kv_bits']} lack"
        )
    return manifest


def read_shape(path: Path) -> ModelShape:
    """The sizes in config.json, in Hugging Face's words."""
    config = read_json(path, CONFIG)

    def whole(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < LARGEST:
            raise ArtifactError(
                f"artifact {path}: {CONFIG} needs {name} (a whole number), found {value!r:.40}"
            )
        return value

    def size(name: str, default: int | None = None) -> int:
        value = config.get(name)
        return whole(name, default if value is None else value)

    heads, eos = size("num_attention_heads"), config.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return ModelShape(
        layers=size("num_hidden_layers"),
        kv_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", 0) or size("hidden_size") // max(heads, 1),
        vocab_size=size("vocab_size"),
        bos_token_id=size("bos_token_id"),
        eos_token_ids=tuple(whole("eos_token_id", token) for token in eos_ids),
    )


def read_file(path: Path, name: str) -> bytes:
    """A small file of the artifact."""
    try:
        return (path / name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"artifact {path}: cannot read {name}: {reason}") from error


def read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(read_file(path, name))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"artifact {path}: {name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"artifact {path}: {name} must hold a JSON object")
    return found


def _list(path: Path) -> str:
    try:
        return ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    except OSError as error:
        raise ArtifactError(f"artifact: cannot read {path}: {error.strerror}") from error


def _mismatch(value: Any, schema: Schema, where: str) -> str | None:
    """The first place where `value` is not as the schema says, and what is there instead."""
    if isinstance(schema, type):
        if isinstance(value, schema) and not isinstance(value, bool):
            return None
        return f"{where} ({schema.__name__}), found {value!r:.40}"
    if isinstance(schema, range):
        if type(value) is int and value in schema:
            return None
        return f"{where} (a whole number from {schema.start} on), found {value!r:.40}"
    same = type(value) is type(schema)  # spelt in the if, mypy takes the value for a schema
    if not same:
        return f"{where} ({type(schema).__name__}), found {value!r:.40}"
    inside: list[tuple[Any, Schema, str]]
    if isinstance(schema, list):
        inside = [(item, schema[0], f"{where}[{i}]") for i, item in enumerate(value)]
    else:
        every, dot = schema.get(None), "." if where else ""
        fields = schema if every is None else dict.fromkeys(value, every)
        if missing := [name for name in fields if name not in value]:
            return f"{where}{dot}{missing[0]}, found nothing"
        inside = [(value[name], field, f"{where}{dot}{name}") for name, field in fields.items()]
    return next(filter(None, (_mismatch(*item) for item in inside)), None)
