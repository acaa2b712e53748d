"""The peer's models: which shapes its formats hold, and the files that have them.

A file is named by all that determines what is in it, and is there whole or not at all: what is
compared is never another run's model, nor the rest of one that was interrupted.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from benchmarks.worker import Worker, WorkerError

FORMATS = ("TQ2_0", "TQ1_0")  # llama.cpp's ternary ones
CACHES = ("f16", "q8_0", "q4_0")  # types of its KV cache
CONTENTS = 1  # what llama_cpp_peer.py makes of a shape; one more where that changes
BLOCK = 256  # weights, of both formats and of Q6_K; a row is a whole number of them
SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rope_theta",
)


def check_shape(shape: dict[str, Any], groups: Collection[str]) -> None:
    """A WorkerError where the peer has no kernels or, if a group needs it, no model of the shape.
    `shape` has the fields of a config.json."""
    for name in ("hidden_size", "intermediate_size"):
        if shape[name] % BLOCK:
            raise WorkerError(
                f"peer: asked for {name} {shape[name]}, its formats pack {BLOCK} weights of a row; "
                f"possible: a multiple of {BLOCK}, or no --peer-python"
            )
    size = shape["hidden_size"] // shape["num_attention_heads"]
    if {"model", "context"} & set(groups) and shape["head_dim"] != size:
        raise WorkerError(
            f"peer: asked for head_dim {shape['head_dim']}; possible: {size}, hidden_size over "
            "num_attention_heads, or --only kernels, or no --peer-python"
        )


def model_file(folder: Path, kind: str, shape: dict[str, Any]) -> Path:
    """Where a model of this shape lies, or will."""
    contents = json.dumps([CONTENTS, {name: shape[name] for name in SHAPE}])
    return folder / f"random-{kind}-{hashlib.sha256(contents.encode()).hexdigest()[:12]}.gguf"


def written(worker: Worker, folder: Path, kind: str, shape: dict[str, Any]) -> Path:
    """The file of a model, written by the peer unless it is there."""
    path = model_file(folder, kind, shape)
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        try:
            of = {name: shape[name] for name in SHAPE}
            worker.ask("write_model", path=str(part), kind=kind, shape=of)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def load(worker: Worker, path: Path, **arguments: Any) -> None:
    try:
        worker.ask("load", path=str(path), **arguments)
    except WorkerError as error:
        raise WorkerError(f"{error}; possible: delete {path}, it is then written anew") from error
