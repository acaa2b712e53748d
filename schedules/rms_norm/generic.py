"""rms_norm, alone or with a quantizer behind it, on any CPU: a row stays in L1, h is recomputed.

    for m in M:                          parallel when M > 1
        sums[L] += x[m, :]^2             float64, L accumulators
        rstd = 1 / sqrt(sum / K + eps)   float64, rounded once
        stat = mean or max of |h|        h = (x * rstd) * gain, two float32 products
        q[m, :] = quantize(h)            h again: two products are cheaper than a store and a load

    tile | value    | bound by
    L    | lanes(8) | one int8 vector of results; its 4 float32 or 8 float64 vectors of
         |          | accumulators fit the register file

Measured: not yet.
"""

import math
import operator

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.intrin.vector import each, fill, fold, rounded, store
from schedules.targets import CpuTarget

SMALLEST_STAT = 1e-5  # of a mean or a maximum, before it becomes a scale
SQRT7 = 2.6457513110645907
FP4_THRESHOLDS = ((0.5, 1), (2.5, 1), (5.0, 2), (10.0, 4)), ((1.5, 1), (3.5, 1), (7.0, 2))


def kernel(quantizer: str | None, k: int, eps: float, target: CpuTarget) -> PrimFunc:
    """quantizer None: (x, gain, h). 'int4', 'int8', 'fp4': (x, gain, q, scale)."""
    if quantizer is None:
        return _float_kernel(k, eps, target.lanes(8))
    if quantizer not in QUANTIZERS:
        raise ValueError(f"rms_norm: no quantizer {quantizer!r}; has {[*QUANTIZERS]} and None")
    write_stat, to_scale, to_factor, to_code = QUANTIZERS[quantizer]
    lanes = target.lanes(8)

    @T.inline
    def quantize_row(x, gain, q, scale, m):
        sums = T.alloc_buffer((lanes,), "float64", scope="local")
        peaks = T.alloc_buffer((lanes,), "float32", scope="local")
        facts = T.alloc_buffer((3,), "float32", scope="local")  # rstd, stat, factor

        write_rstd(x, m, k, eps, lanes, sums, facts)
        write_stat(x, gain, m, k, lanes, sums, peaks, facts)
        facts[1] = T.max(facts[1], T.float32(SMALLEST_STAT))
        scale[m] = to_scale(facts[1])
        facts[2] = to_factor(facts[1])
        each(
            k,
            lanes,
            lambda i, j: store(q, (m, i), to_code(normed(x, gain, facts, m, i), facts[2])),
        )

    @T.prim_func(s_tir=True)
    def rms_norm(x_: T.handle, gain: T.Buffer((k,), "float32"), q_: T.handle, scale_: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(x_, (rows, k), "float32")
        q = T.match_buffer(q_, (rows, k), "int8")
        scale = T.match_buffer(scale_, (rows,), "float32")
        with T.sblock("root"):
            if rows == 1:
                quantize_row(x, gain, q, scale, 0)
            else:
                for m in T.parallel(rows):
                    quantize_row(x, gain, q, scale, m)

    return rms_norm


def _float_kernel(k: int, eps: float, lanes: int) -> PrimFunc:
    @T.inline
    def norm_row(x, gain, h, m):
        sums = T.alloc_buffer((lanes,), "float64", scope="local")
        facts = T.alloc_buffer((1,), "float32", scope="local")

        write_rstd(x, m, k, eps, lanes, sums, facts)
        each(k, lanes, lambda i, j: store(h, (m, i), normed(x, gain, facts, m, i)))

    @T.prim_func(s_tir=True)
    def rms_norm(x_: T.handle, gain: T.Buffer((k,), "float32"), h_: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows = T.int64()
        x = T.match_buffer(x_, (rows, k), "float32")
        h = T.match_buffer(h_, (rows, k), "float32")
        with T.sblock("root"):
            if rows == 1:
                norm_row(x, gain, h, 0)
            else:
                for m in T.parallel(rows):
                    norm_row(x, gain, h, m)

    return rms_norm


def normed(x, gain, facts, m, i):
    return x[m, i] * facts[0] * gain[i]


def write_rstd(x, m, k: int, eps: float, lanes: int, sums, facts) -> None:
    """facts[0] = 1 / rms of the row."""

    def add_square(i, j):
        store(sums, (j,), sums[j] + T.cast(x[m, i], "float64") * T.cast(x[m, i], "float64"))

    fill(lanes, sums, T.float64(0))
    each(k, lanes, add_square)
    fold(lanes, sums, operator.add)
    rms = T.sqrt(sums[0] / T.float64(k) + T.float64(eps))
    store(facts, (0,), T.cast(T.float64(1) / rms, "float32"))


def write_mean(x, gain, m, k: int, lanes: int, sums, peaks, facts) -> None:
    """facts[1] = mean |h|."""

    def add_abs(i, j):
        h = normed(x, gain, facts, m, i)
        store(sums, (j,), sums[j] + T.cast(T.abs(h), "float64"))

    fill(lanes, sums, T.float64(0))
    each(k, lanes, add_abs)
    fold(lanes, sums, operator.add)
    store(facts, (1,), T.cast(sums[0] / T.float64(k), "float32"))


def write_max(x, gain, m, k: int, lanes: int, sums, peaks, facts) -> None:
    """facts[1] = max |h|."""

    def max_abs(i, j):
        store(peaks, (j,), T.max(peaks[j], T.abs(normed(x, gain, facts, m, i))))

    fill(lanes, peaks, T.float32(0))
    each(k, lanes, max_abs)
    fold(lanes, peaks, T.max)
    store(facts, (1,), peaks[0])


def int4_scale(beta):
    return beta / T.float32(SQRT7)


def int4_factor(beta):
    return T.float32(SQRT7) / beta


def int4_code(h, inv):
    return T.cast(rounded(h * inv, -8, 7), "int8")


def int8_scale(gamma):
    return gamma / T.float32(127)


def int8_factor(gamma):
    return T.float32(127) / gamma


def int8_code(h, inv):
    return T.cast(rounded(h * inv, -128, 127), "int8")


def fp4_scale(gamma):
    return gamma / T.float32(12)


def fp4_code(h, scale):
    """Twice the nearest E2M1 value: each threshold passed adds the step to the next value."""
    y = T.abs(h) / scale
    above, from_ = FP4_THRESHOLDS
    code = T.int32(0)
    for threshold, step in above:
        code += T.Select(y > T.float32(threshold), T.int32(step), T.int32(0))
    for threshold, step in from_:
        code += T.Select(y >= T.float32(threshold), T.int32(step), T.int32(0))
    return T.cast(T.Select(h < T.float32(0), -code, code), "int8")


QUANTIZERS = {
    "int4": (write_mean, int4_scale, int4_factor, int4_code),
    "int8": (write_max, int8_scale, int8_factor, int8_code),
    "fp4": (write_max, fp4_scale, fp4_scale, fp4_code),
}
assert math.isclose(SQRT7, math.sqrt(7))
