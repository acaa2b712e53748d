"""What ships: opens an artifact directory, keeps the KV cache, samples and streams text.

    from runtime import Engine
    engine = Engine.load("dist/novels-42m-x86-avx2")
    for piece in engine.generate("It was a", max_new_tokens=32):
        print(piece, end="", flush=True)

Imports TVM's runtime, numpy, tokenizers and rich; never torch, TVM's compiler or the rest of this
repository. Importing this package loads none of them: names are resolved on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.artifact import Artifact
    from runtime.engine import Engine
    from runtime.errors import ArtifactError, RuntimeRefusal
    from runtime.generation import Generation
    from runtime.kv_cache import KVCache
    from runtime.sampler import Sampler

__all__ = [
    "Artifact",
    "ArtifactError",
    "Engine",
    "Generation",
    "KVCache",
    "RuntimeRefusal",
    "Sampler",
]

_HOME = {
    "Artifact": "runtime.artifact",
    "ArtifactError": "runtime.errors",
    "Engine": "runtime.engine",
    "Generation": "runtime.generation",
    "KVCache": "runtime.kv_cache",
    "RuntimeRefusal": "runtime.errors",
    "Sampler": "runtime.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
