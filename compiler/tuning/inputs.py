"""Inputs: arguments to time and check a kernel with, and the reference's results for them.

The reference is model/ops.py, the definition of correct, called for a slice of the outputs at a
time so that widened weights stay small. Weights are int8 here; they are packed for each layout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model import grouped, ops
from schedules.layouts import LAYOUTS

F32 = np.float32
CHECK_ROWS = 5  # besides the rows that are timed: a tail of every tile
SLICE = 4096  # outputs of the reference at a time
GATE_ZEROS = 0.67  # share of gates <= 0 (arXiv 2411.04965 table 3, 7B)
LIMITS = {4: (-8, 7), 8: (-128, 127)}


@dataclass(frozen=True)
class Case:
    """A call at one number of rows: arguments before the weight and after it, and the result."""

    before: list[np.ndarray]
    after: list[np.ndarray]
    expected: np.ndarray


Sizes = Mapping[str, int | float]
Maker = Callable[[Sizes, int, float, np.random.Generator], tuple[list, list]]


def activations(m: int, k: int, act_bits: int, active: float, rng) -> np.ndarray:
    low, high = LIMITS[act_bits]
    q = rng.integers(low, high + 1, (m, k)).astype(np.int8)
    if active < 1:
        q[q == 0] = 1
        order = np.argsort(rng.random((m, k)), axis=1)
        np.put_along_axis(q, order[:, round(active * k) :], 0, axis=1)
    return q


def scales(rng, *sizes: int) -> list[np.ndarray]:
    return [rng.uniform(0.01, 2, size).astype(F32) for size in sizes]


def dense(sizes: Sizes, m: int, active: float, rng) -> tuple[list, list]:
    """q, scale, w, w_scale"""
    k, n = int(sizes["K"]), int(sizes["N"])
    q = activations(m, k, int(sizes.get("act_bits", 8)), active, rng)
    scale, w_scale = scales(rng, m, n)
    return [q, scale], [w_scale]


def gated(sizes: Sizes, m: int, active: float, rng) -> tuple[list, list]:
    """dense and a gate"""
    before, after = dense(sizes, m, active, rng)
    gate = rng.standard_normal((m, int(sizes["N"]))).astype(F32)
    gate = np.where(rng.random(gate.shape) < GATE_ZEROS, -np.abs(gate), np.abs(gate))
    return before, [*after, gate]


def sparse(sizes: Sizes, m: int, active: float, rng) -> tuple[list, list]:
    """dense, the list of what is not zero, and a residual"""
    (q, scale), after = dense(sizes, m, active, rng)
    index = np.argsort(q == 0, axis=1, kind="stable").astype(np.int32)
    count = (q != 0).sum(axis=1).astype(np.int32)
    residual = rng.standard_normal((m, int(sizes["N"]))).astype(F32)
    return [q, scale, index, count], [*after, residual]


MAKERS: dict[str, Maker] = {
    "ternary_matmul": dense,
    "ternary_glu_matmul": gated,
    "sparse_ternary_matmul": sparse,
    "int8_matmul": dense,
    "grouped_matmul": dense,
}


def make_weights(op: str, sizes: Sizes, rng) -> np.ndarray:
    if op == "grouped_matmul":
        return make_table(int(sizes["N"]), int(sizes["K"]), int(sizes["bits"]), rng)
    low, high = (-128, 128) if op == "int8_matmul" else (-1, 2)
    return rng.integers(low, high, (int(sizes["N"]), int(sizes["K"])), dtype=np.int8)


def make_table(n: int, k: int, bits: int, rng) -> np.ndarray:
    """Random codes and group scales, packed; a part of the rows over and over."""
    rows, top = min(n, SLICE), 2 ** (bits - 1)
    codes = rng.integers(-top, top, (rows, k), dtype=np.int8)
    group = rng.integers(1, grouped.MAX_GROUP_SCALE + 1, (rows, k // grouped.GROUP), dtype=np.uint8)
    packed = grouped.pack(torch.from_numpy(codes), torch.from_numpy(group), bits).numpy()
    return np.resize(packed, (n, packed.shape[1]))


def make_case(op: str, sizes: Sizes, m: int, active: float, w: np.ndarray, rng) -> Case:
    before, after = MAKERS[op](sizes, m, active, rng)
    statics = [int(sizes[name]) for name in ("act_bits", "bits") if name in sizes]
    return Case(before, after, reference(op, before, w, after, statics))


def reference(op: str, before: Sequence, w: np.ndarray, after: Sequence, statics: list):
    """f32[M, N] of torch.ops.bitnet.<op>; what is indexed by N is cut into slices."""
    n = w.shape[0]
    function = getattr(ops, op)
    slices = []
    for start in range(0, n, SLICE):
        part = slice(start, min(n, start + SLICE))
        tensors = [*before, w[part], *(array[..., part] for array in after)]
        arguments = [torch.from_numpy(np.ascontiguousarray(array)) for array in tensors]
        slices.append(function(*arguments, *statics).numpy())
    return np.concatenate(slices, axis=1)


def save_case(path: Path, case: Case) -> None:
    """As worker.py reads it."""
    arrays = {f"before{i}": array for i, array in enumerate(case.before)}
    arrays |= {f"after{i}": array for i, array in enumerate(case.after)}
    arrays["expected"] = case.expected
    np.savez(path, allow_pickle=False, **arrays)


def save_weights(path: Path, w: np.ndarray, layout: str | None) -> None:
    np.save(path, LAYOUTS[layout].pack(w) if layout else w)
