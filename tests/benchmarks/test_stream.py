"""The streaming read that shares of bandwidth refer to: it reads every line."""

import numpy as np
import pytest
import tvm

from benchmarks import stream
from runtime import tvm_runtime
from schedules import targets


@pytest.mark.parametrize("form", stream.FORMS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lines", [1, 37, 512])
def test_every_line_is_read(form, threads, lines):
    memory = np.random.default_rng(0).integers(-128, 128, lines * stream.LINE, dtype=np.int8)
    target = targets.find("native")
    func = stream.kernel(memory.nbytes, target, *form).with_attr("global_symbol", "stream")
    read = tvm.compile(tvm.IRModule({"stream": func}), target=target.to_tvm())["stream"]
    out = tvm.runtime.tensor(np.zeros((256, 16), np.int32))
    tvm_runtime.use_threads(threads)
    read(tvm.runtime.tensor(memory), out)
    found = np.bitwise_xor.reduce(out.numpy(), axis=0)
    np.testing.assert_array_equal(
        found, np.bitwise_xor.reduce(memory.view(np.int32).reshape(lines, 16), axis=0)
    )
