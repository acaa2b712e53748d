"""A kernel compiled by itself, called with numpy arrays; the targets that this host can run."""

import numpy as np
import pytest
import tvm

from schedules.targets import TARGETS, CpuTarget

ROWS = (0, 1, 2, 5, 33, 128)  # none, decode, and prefills that no tile divides
EVERY_TARGET = [
    pytest.param(
        spec,
        id=spec.name,
        marks=pytest.mark.skipif(
            not spec.runs_here(), reason=f"needs {spec.machine} with {spec.cpu_flags}"
        ),
    )
    for spec in TARGETS.values()
    if isinstance(spec, CpuTarget)
]


def compiled(func: tvm.tirx.PrimFunc, target: CpuTarget):
    """call(*arrays) -> the arrays as the kernel left them, outputs and caches included."""
    mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
    entry = tvm.compile(mod, target=target.to_tvm())["kernel"]

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        entry(*tensors)
        return [t.numpy() for t in tensors]

    return call
