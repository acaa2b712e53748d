"""Device code: the fat binary that compiler/nvcc.py put into a library as text, for TVM's module.

TVM 0.27 hands the text of a CUDA module to `tvm_callback_cuda_compile` when a kernel is first used,
and loads what comes back. Nothing is compiled there: a host needs the driver and no CUDA toolkit.
"""

import base64
import importlib
from typing import Any

CALLBACK = "tvm_callback_cuda_compile"
PREFIX = "fatbin:"


def install() -> None:
    """Take the callback; text that is not ours goes to whom it went before."""
    tvm_ffi = importlib.import_module("tvm_ffi")
    before = tvm_ffi.get_global_func(CALLBACK, allow_missing=True)

    def decode(text: str) -> Any:
        if text.startswith(PREFIX):
            return base64.b64decode(text[len(PREFIX) :])
        if before is None:
            raise RuntimeError("the library holds CUDA source, which this runtime cannot compile")
        return before(text)

    tvm_ffi.register_global_func(CALLBACK, decode, override=True)
