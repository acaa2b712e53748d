"""rms_norm_topk_int8 on CUDA: a block a row, the row in registers from the norm to the list.

    for m in M:                              blockIdx.x
        h[P] = (x[m, :] * rstd) * gain       threadIdx.x: P columns each; neighbours, where listed
        h = 0 but for the k largest          histogram_cuda.py
        q[m, :] = quantize(h)                gamma is of all of the row
        index[m, :] = columns of q != 0      a scan: runs are neighbours, so the list rises

    tile | value          | bound by
    P    | as in rms_norm | threads of a block

k = K skips the selection. rms_norm_mask_int8 leaves out the list, which costs a prompt more than
its norm: 4 bytes a column that is not zero, each thread its own run of them, where q is one.

Rows of which shared memory cannot list all columns (more than some 10000 on the least GPUs) find
the k-th largest by bounds:

    low, high = 0, gamma                     bit patterns: non-negative floats order as they do
    while high - low > 1, not exactly k reach low:
        counts of |h| >= three bounds        a quarter of the range is left; two barriers
    ties of low beyond k: not kept           a scan, only where more than k reach low

Three bounds a pass, because their counts of 17 bits fit 64: K below 2^17.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.rms_norm.cuda import Row
from schedules.rms_norm.generic import SMALLEST_STAT, int8_code, int8_factor, int8_scale
from schedules.rms_norm_topk.generic import magnitude
from schedules.rms_norm_topk.histogram_cuda import Selection, size_of
from schedules.targets import GpuTarget

BOUNDS = 3
COUNT_BITS = 17
STATIC_BYTES = 1024  # that other shared memory takes at most
SMALL_BYTES = 48 * 1024  # above which TVM asks the driver, if dynamic memory alone is


def kernel(k: int, keep: int, eps: float, target: GpuTarget, is_listed: bool = True) -> PrimFunc:
    """(x, gain, q, scale, index, count) for rows of k columns of which the `keep` largest stay.

    Without the last two where it is not listed.
    """
    if not 1 <= keep <= k:
        raise ValueError(f"rms_norm_topk: keep {keep} asked, rows have {k} columns")
    assert k < 1 << COUNT_BITS, f"rms_norm_topk: {k} columns, counts have {COUNT_BITS} bits"
    row = Row(k, eps, in_runs=is_listed or not fits(k, target))  # lists and scans rise
    rows = Var("M", "int64")

    def quantize_row(x, gain, q, scale, index, count, m, t):
        scratch = cuda.Scratch(t, row.threads)
        selection = selection_of(row, keep, t, target)
        h = row.normed(x, gain, m, t, scratch)
        gamma = T.bind(T.max(row.max_abs(h, scratch), T.float32(SMALLEST_STAT)))
        if selection:
            selection.mask(h, [row.column(t, i) for i in range(row.run)], gamma)
        factor = T.bind(int8_factor(gamma))
        codes = cuda.local("int8", row.run)
        for i in range(row.run):
            cuda.store(codes, int8_code(h[i], factor), i)
        if keep < k and not selection:
            mask(codes, h, row, keep, gamma, t, scratch)
        row.store(lambda column, value: cuda.store(q, value, m, column), codes, t)
        if is_listed:
            list_nonzero(codes, row, index, count, m, t, scratch)
        with cuda.when(t == 0):
            cuda.store(scale, int8_scale(gamma), m)

    @T.prim_func(s_tir=True)
    def rms_norm_topk(
        x: T.Buffer((rows, k), "float32"),
        gain: T.Buffer((k,), "float32"),
        q: T.Buffer((rows, k), "int8"),
        scale: T.Buffer((rows,), "float32"),
        index: T.Buffer((rows, k), "int32"),
        count: T.Buffer((rows,), "int32"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            with cuda.some_rows(rows):
                with cuda.blocks(rows) as m:
                    with cuda.threads(row.threads) as t:
                        quantize_row(x, gain, q, scale, index, count, m, t)

    if is_listed:
        return rms_norm_topk
    func = rms_norm_topk
    return PrimFunc(func.params[:4], func.body, func.ret_type, func.attrs)


def selection_of(row: Row, keep: int, t, target: GpuTarget) -> Selection | None:
    """None where all columns are kept, or a list of all does not fit."""
    size = size_of(row.k)
    if keep == row.k or not fits(row.k, target):
        return None
    is_small = size + STATIC_BYTES <= SMALL_BYTES
    memory = cuda.shared_bytes(size if is_small else max(size, SMALL_BYTES + 16))
    selection = Selection(row.k, keep, t, row.threads, memory)
    selection.clear()
    cuda.sync()
    return selection


def fits(k: int, target: GpuTarget) -> bool:
    """A list of all columns, in shared memory."""
    return size_of(k) + STATIC_BYTES <= target.shared_bytes


def mask(codes, h, row: Row, keep: int, gamma, t, scratch: cuda.Scratch) -> None:
    """codes = 0 but for the `keep` largest |h|; ties at the threshold go to the lower index."""
    bits = cuda.local("int32", row.run)
    for i in range(row.run):  # columns past K reach no bound
        is_column = row.column(t, i) < row.k
        cuda.store(bits, T.Select(is_column, magnitude(h[i]), T.int32(-1)), i)
    low, high, surplus = (cuda.local("int32", 1) for _ in range(3))
    cuda.store(low, T.int32(0), 0)
    cuda.store(high, magnitude(gamma) + 1, 0)
    cuda.store(surplus, T.int32(row.k - keep), 0)  # that reach low beyond `keep`
    with T.While(T.And(high[0] - low[0] > 1, surplus[0] > 0)):
        step = T.bind(T.max(T.shift_right(high[0] - low[0], 2), 1))
        narrow(low, high, surplus, bits, step, keep, scratch)
    ties = cuda.local("int32", 1)
    cuda.store(ties, T.int32(0), 0)
    for i in range(row.run):
        cuda.store(ties, ties[0] + T.cast(bits[i] == low[0], "int32"), 0)
        with cuda.when(bits[i] < low[0]):
            cuda.store(codes, T.int8(0), i)
    with cuda.when(surplus[0] > 0):
        before, all_ties = scratch.scan(ties[0])
        rank = cuda.local("int32", 1)
        cuda.store(rank, before, 0)
        for i in range(row.run):
            with cuda.when(bits[i] == low[0]):
                with cuda.when(rank[0] >= all_ties - surplus[0]):
                    cuda.store(codes, T.int8(0), i)
                cuda.store(rank, rank[0] + 1, 0)


def narrow(low, high, surplus, bits, step, keep: int, scratch: cuda.Scratch) -> None:
    """low and high to the neighbours among low, low + step, ... between which `keep` lies."""
    start, end = T.bind(low[0]), T.bind(high[0])
    packed = T.int64(0)
    for j in range(BOUNDS):
        reached = T.int32(0)
        for i in range(int(bits.shape[0])):
            reached = reached + T.cast(bits[i] >= start + (j + 1) * step, "int32")
        of_warp = T.cast(cuda.warp_count(T.bind(reached)), "int64")
        packed = packed + T.shift_left(of_warp, T.int64(j * COUNT_BITS))
    partial = scratch.of_lane(scratch.share(T.bind(packed)), T.int64(0))
    cuda.store(high, T.min(end, start + step), 0)
    for j in range(BOUNDS):
        field = T.shift_right(partial, T.int64(j * COUNT_BITS)) & T.int64((1 << COUNT_BITS) - 1)
        reached = cuda.warp_count(T.bind(T.cast(field, "int32")))
        bound = start + (j + 1) * step
        with cuda.when(reached >= keep):
            cuda.store(low, bound, 0)
            cuda.store(surplus, reached - keep, 0)
            cuda.store(high, T.min(end, bound + step) if j + 1 < BOUNDS else end, 0)


def list_nonzero(codes, row: Row, index, count, m, t, scratch: cuda.Scratch) -> None:
    """index[m, :count[m]] = columns of non-zero q, rising."""
    nonzero = T.int32(0)
    for i in range(row.run):
        nonzero = nonzero + T.cast(codes[i] != T.int8(0), "int32")
    before, total = scratch.scan(T.bind(nonzero))
    at = cuda.local("int32", 1)
    cuda.store(at, before, 0)
    for i in range(row.run):
        with cuda.when(codes[i] != T.int8(0)):
            cuda.store(index, row.column(t, i), m, at[0])
            cuda.store(at, at[0] + 1, 0)
    with cuda.when(t == 0):
        cuda.store(count, total, m)
