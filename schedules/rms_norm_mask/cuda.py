"""rms_norm_mask_int8 on CUDA: rms_norm_topk/cuda.py as far as q, for rows multiplied dense.

    for m in M:                              blockIdx.x
        h[P] = (x[m, :] * rstd) * gain       threadIdx.x: a run of P neighbouring columns each
        low = the keep-th largest |h|        passes of two barriers
        q[m, :] = quantize(h) where kept

A list costs a prompt more than its norm: 4 bytes a column that is not zero, each thread its own run
of them, where q is one.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.rms_norm.cuda import Row
from schedules.rms_norm.generic import SMALLEST_STAT, int8_code, int8_factor, int8_scale
from schedules.rms_norm_topk.cuda import COUNT_BITS, mask
from schedules.targets import GpuTarget


def kernel(k: int, keep: int, eps: float, target: GpuTarget) -> PrimFunc:
    """(x, gain, q, scale) for rows of k columns of which the `keep` largest stay."""
    if not 1 <= keep < k:
        raise ValueError(f"rms_norm_mask: keep {keep} asked, rows have {k} columns")
    assert k < 1 << COUNT_BITS, f"rms_norm_mask: {k} columns, counts have {COUNT_BITS} bits"
    row, rows = Row(k, eps), Var("M", "int64")

    def quantize_row(x, gain, q, scale, m, t):
        scratch = cuda.Scratch(t, row.threads)
        h = row.normed(x, gain, m, t, scratch)
        gamma = T.bind(T.max(row.max_abs(h, scratch), T.float32(SMALLEST_STAT)))
        factor = T.bind(int8_factor(gamma))
        codes = cuda.local("int8", row.run)
        for i in range(row.run):
            cuda.store(codes, int8_code(h[i], factor), i)
        mask(codes, h, row, keep, gamma, t, scratch)
        row.store(lambda column, value: cuda.store(q, value, m, column), codes, t)
        with cuda.when(t == 0):
            cuda.store(scale, int8_scale(gamma), m)

    @T.prim_func(s_tir=True)
    def rms_norm_mask(
        x: T.Buffer((rows, k), "float32"),
        gain: T.Buffer((k,), "float32"),
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            with cuda.some_rows(rows):
                with cuda.blocks(rows) as m:
                    with cuda.threads(row.threads) as t:
                        quantize_row(x, gain, q, scale, m, t)

    return rms_norm_mask
