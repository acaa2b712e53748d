"""What the matmul kernels' tests share: cases, activations of every kind, numpy's reference."""

import importlib
import importlib.util
from functools import lru_cache

import numpy as np
import torch

from model import grouped
from schedules.layouts import LAYOUTS
from schedules.targets import TargetSpec
from tests.schedules.compiled import compiled

ROWS = (0, 1, 2, 5, 16, 33, 128)
# Odd ones, tails of every unit of the kernels, sizes of models, the first K past 16-bit sums.
SHAPES = [
    (1, 29),
    (3, 1),
    (63, 2),
    (64, 3),
    (65, 7),
    (100, 15),
    (130, 17),
    (192, 33),
    (321, 64),
    (130, 127),
    (512, 512),
    (65, 2563),
    (512, 1536),
    (130, 4095),
]
LIMITS = {4: (-8, 7), 8: (-128, 127)}
KINDS = ("random", "max", "min", "ones", "zeros", "alternating")


def activations(kind: str, m: int, k: int, act_bits: int, seed: int = 0) -> np.ndarray:
    low, high = LIMITS[act_bits]
    if kind == "random":
        q = np.random.default_rng(seed).integers(low, high + 1, (m, k))
    elif kind == "alternating":
        q = np.where(np.arange(m * k).reshape(m, k) % 2, low, high)
    else:
        q = np.full((m, k), {"max": high, "min": low, "ones": 1, "zeros": 0}[kind])
    return q.astype(np.int8)


def weights(kind: str, n: int, k: int, seed: int = 0) -> np.ndarray:
    if kind == "random":
        return np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)
    return np.full((n, k), {"plus": 1, "minus": -1}[kind], np.int8)


def grouped_table(n: int, k: int, bits: int, kind: str = "random", seed: int = 0):
    """(levels i64[N, K], packed u8[N, B])"""
    top, rng = 2 ** (bits - 1), np.random.default_rng(seed)
    if kind == "random":
        codes = rng.integers(-top, top, (n, k))
        group = rng.integers(1, grouped.MAX_GROUP_SCALE + 1, (n, k // 64))
    else:
        codes = np.full((n, k), {"min": -top, "max": top - 1}[kind])
        group = np.full((n, k // 64), grouped.MAX_GROUP_SCALE)
    tensors = (torch.from_numpy(a) for a in (codes.astype(np.int8), group.astype(np.uint8)))
    return codes * np.repeat(group, 64, axis=1), grouped.pack(*tensors, bits).numpy()


def scales(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.uniform(0.01, 2, size).astype(np.float32) for size in (m, n))


def ones(m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales that leave the integer sum as it is: float32 is exact below 2**24."""
    return np.ones(m, np.float32), np.ones(n, np.float32)


def exact_sum(q: np.ndarray, w: np.ndarray) -> np.ndarray:
    """q @ w.T as float32(int32), through float64's matmul, which is exact below 2**53."""
    acc = q.astype(np.float64) @ w.T.astype(np.float64)
    return acc.astype(np.int32).astype(np.float32)


def module(op: str, target: TargetSpec):
    """The kernel module that a build for `target` picks."""
    for family in target.families:
        if importlib.util.find_spec(f"schedules.{op}.{family}"):
            return importlib.import_module(f"schedules.{op}.{family}")
    raise AssertionError(f"{op}: no kernel in {target.families}")


class Ternary:
    """A kernel of an op that reads packed ternary weights, called with int8[N, K] instead."""

    def __init__(self, op, target, n, k, layout_args=(), kernel_args=(), kernel_end=()):
        kernels = module(op, target)
        self.shape = n, k
        self.layout = LAYOUTS[kernels.layout(*layout_args)]
        self.call = compiled(kernels.kernel(n, k, *kernel_args, target, *kernel_end), target)

    def __call__(self, before, w, w_scale, *after) -> np.ndarray:
        n = self.shape[0]
        out = np.full((before[0].shape[0], n), np.nan, np.float32)
        return self.call(*before, self.layout.pack(w), w_scale, *after, out)[-1]


@lru_cache(4)  # a compiled kernel holds megabytes
def ternary_matmul(target: TargetSpec, n: int, k: int, act_bits: int, epilogue: str) -> Ternary:
    return Ternary("ternary_matmul", target, n, k, (act_bits, epilogue), (act_bits,), (epilogue,))


@lru_cache(4)  # a compiled kernel holds megabytes
def sparse_ternary_matmul(target: TargetSpec, n: int, k: int) -> Ternary:
    return Ternary("sparse_ternary_matmul", target, n, k)
