"""A full GPU beside a captured step: the pool gives back what it holds, and the graph lives on."""

import numpy as np
import pytest
from compiled_model import compile_tiny

from runtime import tvm_runtime
from schedules.targets import compute_capability, find

SMALLEST = 4096  # bytes: what TVM's pool rounds up to
POISON = 0x5A


class Filled:
    """All of the GPU's memory, down to pieces of SMALLEST."""

    def __init__(self, device) -> None:
        self.pieces = []
        tvm_ffi, size = tvm_runtime.load(), 2**40
        make = tvm_runtime.function("runtime.TVMTensorAllocWithScope")
        while size >= SMALLEST:
            try:
                dtype = tvm_ffi.dtype("uint8")
                self.pieces.append(make(tvm_ffi.Shape([size]), dtype, device.handle, None))
            except RuntimeError:
                size //= 2

    def poison(self, device) -> None:
        for piece in self.pieces:
            device._gpu.write(piece, np.full(piece.shape, POISON, np.uint8))

    def is_poison(self, device) -> bool:
        return all((device.fetch(piece) == POISON).all() for piece in self.pieces)


@pytest.mark.skipif(compute_capability() is None, reason="needs a GPU")
def test_a_cuda_graph_outlives_the_pool(tmp_path):
    model = compile_tiny("a4.8-int4", find("cuda").name, tmp_path)
    caches, device = model.caches(3), model.device
    prompt = (np.arange(20), [0] * 20, range(20), [19])
    step = ([5], [0], [0])
    wanted = model.decode(caches, *step)
    model.arguments(caches, "prefill", *prompt)
    full = Filled(device)
    with pytest.raises(RuntimeError) as found:
        model.prefill(caches, *prompt)
    assert (device.why(str(found.value)) or "").startswith("GPU memory: ")
    given_back = Filled(device)
    given_back.poison(device)
    np.testing.assert_array_equal(model.decode(caches, *step), wanted)
    assert given_back.is_poison(device), "the graph wrote to memory that is no longer its own"
    del full, given_back
    logits = model.reference_prefill(caches, *prompt)
    np.testing.assert_array_equal(model.prefill(caches, *prompt), logits)
