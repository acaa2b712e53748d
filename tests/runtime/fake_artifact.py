"""The files around the compiled fake model: parameters, tokenizer, config and manifest."""

import hashlib
import json
import platform
from pathlib import Path

import fake_model
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHUNK_BYTES = 4096
CONFIG = {
    "num_hidden_layers": fake_model.LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": fake_model.KV_HEADS,
    "hidden_size": 4 * fake_model.HEAD_DIM,
    "vocab_size": fake_model.V,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_tokenizer(path: Path) -> None:
    """<bos> 0, <eos> 1, and byte b as token 2 + b."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + rank) for rank, byte in enumerate(hidden)}  # GPT-2's alphabet
    vocabulary = {"<bos>": 0, "<eos>": 1} | {letters[byte]: 2 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def write_params(path: Path) -> list[dict]:
    """params.bin, each tensor on a page of its own; the manifest's list of tensors."""
    tensors = {
        "unused": np.arange(15, dtype=np.uint8).reshape(3, 5),
        "norm": np.zeros(fake_model.V, np.float32),
    }
    entries, data = [], b""
    for name, array in tensors.items():
        data += bytes(-len(data) % 4096)
        entries.append(
            {"name": name, "dtype": str(array.dtype), "shape": list(array.shape),
             "offset": len(data), "bytes": array.nbytes, "layout": None}
        )  # fmt: skip
        data += array.tobytes()
    path.write_bytes(data)
    return entries


def write_manifest(directory: Path, chunk_bytes: int = CHUNK_BYTES, **changes) -> None:
    """artifact.json for the files as they are; a change to None leaves a field out."""
    params = (directory / "params.bin").read_bytes()
    chunks = [params[i : i + chunk_bytes] for i in range(0, len(params), chunk_bytes)]
    library = directory / "model.so"
    manifest = {
        "format": 2, "model": "fake", "target": "generic",
        "device": "cpu", "machine": platform.machine(), "cpu_flags": [],
        "kv_bits": [16, 4, 3], "default_kv_bits": 3, "context_length": fake_model.CONTEXT,
        "library": {
            "file": library.name, "bytes": library.stat().st_size, "sha256": sha256(library)
        },
        "params": {
            "file": "params.bin", "bytes": len(params), "chunk_bytes": chunk_bytes,
            "sha256": [hashlib.sha256(chunk).hexdigest() for chunk in chunks],
        },
        "tensors": json.loads((directory / "tensors.json").read_text()),
        "files": {
            name: sha256(directory / name)
            for name in ("config.json", "tokenizer.json")
            if (directory / name).exists()
        },
        "record": {"tvm_target": {"kind": "llvm"}},
    }  # fmt: skip
    manifest = {name: value for name, value in (manifest | changes).items() if value is not None}
    (directory / "artifact.json").write_text(json.dumps(manifest))


def write_artifact(directory: Path) -> None:
    """Compile the fake model and write everything beside it."""
    fake_model.compile_to(str(directory / "model.so"))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(directory / "tokenizer.json")
    entries = write_params(directory / "params.bin")
    (directory / "tensors.json").write_text(json.dumps(entries))
    write_manifest(directory)
