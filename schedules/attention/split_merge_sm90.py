"""split_sm90's end: the shares of a cluster's blocks on one scale, by distributed shared memory."""

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention.split_attend_sm90 import Block
from schedules.attention.split_row_sm90 import BLOCKS, UNITS
from schedules.intrin import cuda
from schedules.intrin import lanes_cuda as lanes


def finish(block: Block, y, m, first_head: Expr) -> None:
    """The block's share of the outputs, all of one head: a lane for each of the C U shares."""
    form = block.form
    o = cuda.shared("float64", UNITS, form.heads, form.dim)
    state = cuda.shared("float64", UNITS, form.heads, 2)
    cuda.sync()  # TVM may give these the memory of keys and values
    for column in range(form.columns):
        for f in range(form.fields):
            with cuda.when(block.lane + column * cuda.WARP < form.plane):
                d = block.dim_of(column, f)
                cuda.store(o, block.o[column * form.fields + f], block.unit, block.h, d)
    with cuda.when(block.lane == 0):
        for i in range(2):
            cuda.store(state, block.state[i], block.unit, block.h, i)
    cuda.sync_cluster()
    merge(block, o, state, y, m, first_head)
    cuda.sync_cluster()  # a block's shared memory lives until all have read it


def merge(block: Block, o, state, y, m, first_head: Expr) -> None:
    """C neighbouring lanes an output; the factors of all C U shares are in a warp's lanes."""
    form, lane = block.form, block.lane
    outputs = form.heads * form.dim // BLOCKS  # of a block
    first = T.bind(block.rank * outputs)
    h = T.bind(first // form.dim)
    u, other = T.bind(lane % UNITS), T.bind(T.cast(lane // UNITS, "uint32"))
    peak = cuda.load_remote(state, (u * form.heads + h) * 2, other)
    total = cuda.load_remote(state, (u * form.heads + h) * 2 + 1, other)
    factor = T.bind(T.exp(peak - lanes.max_float64(peak)))
    total = lanes.sum_float64(T.bind(factor * total))
    remote = T.bind(T.cast(lane % BLOCKS, "uint32"))
    factors = [T.bind(cuda.shuffle(factor, lane % BLOCKS * UNITS + u)) for u in range(UNITS)]
    t, threads = block.warp * cuda.WARP + lane, form.warps * cuda.WARP
    with T.serial(-(-outputs * BLOCKS // threads)) as step:
        i = T.bind(first + T.min((step * threads + t) // BLOCKS, outputs - 1))
        value = T.float64(0)
        for u in range(UNITS):
            at = u * form.heads * form.dim + i
            value = value + factors[u] * cuda.load_remote(o, at, remote)
        value = cuda.warp_reduce(T.bind(value), "sum", BLOCKS)
        with cuda.when(lane % BLOCKS == 0):
            y_at = first_head * form.dim + i
            cuda.store(y, T.cast(value / total, "float32"), m, y_at)
