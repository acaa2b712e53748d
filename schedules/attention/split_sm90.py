"""attention of few rows on Hopper: the context is split over the blocks of a cluster.

    for m, kv head, H heads of its group:        blockIdx.z, blockIdx.y
        for rank in C:                           blockIdx.x: the blocks of a cluster
            for round in blocks/(C U):           the next round's loads go out before the math
                for u in U: K[64], V[64] -> shared        positions ((round U + u) C + rank) 64 on
                for u, h in U, H:                threadIdx.y: a warp a head and block of positions
                    s[64 / H, H] = q8 . k[t]     a share of the keys for all heads, dp4a
                    p[64] = softmax step         of the warp's head: float64, lane reductions
                    o = o * rescale + (sum of p[t] v[t]) * unit    a share of the values' bytes
        y[H, D] = sum of o on one scale          U shares, then C sent within the cluster, float64

    tile | value | bound by
    64   |       | the definition: the positions that share a unit
    C    | 8     | the largest portable cluster: one round up to a context of 512 with one u busy
    U    | 4     | 4096 positions in two rounds
    H    | 2, 1  | what divides a group of heads; K and V are read and unpacked once for all H. Four
                   are 512 threads of 128 registers: all of a multiprocessor, so that no neighbour's
                   launch lies beside it. A step of 2B-4T shapes at 0, 512, 4000, H100, us:
                   four 725, 747, 905; two 710, 736, 846; one 725, 757, 942; two with U = 2 726,
                   735, 1007

With `Rope` the kernel also turns q and the row's own key, and appends key and value to the cache:
what rope and kv_append do, for the one row of a step. The block that holds the row's position then
reads it from registers. All other positions were written by earlier steps, so their loads need not
wait for the launch before.

    file                  | what
    split_row_sm90.py     | sizes, the row
    split_tile_sm90.py    | loads
    split_attend_sm90.py  | a round's arithmetic
    split_append_sm90.py  | the row's own key and value
    split_merge_sm90.py   | the cluster's shares

Integers and float64 give the definition's bits in any order (docs/architecture.md, "Attention").
"""

from tvm.script import tirx as T

from schedules.attention.split_append_sm90 import Own
from schedules.attention.split_attend_sm90 import Block
from schedules.attention.split_merge_sm90 import Merge
from schedules.attention.split_row_sm90 import BLOCKS, Cache, Form, Rope, Row
from schedules.intrin import cuda


def launch(form: Form, rows, qkv, words, scales, slots, positions, y, rope=None) -> None:
    """A cluster for every row and H heads. With `rope` (cos, sin), rows is 1 and the row's key and
    value are turned and appended first."""

    def emit(rank, g, m, warp, lane):
        first_head = T.bind(g * form.heads)
        slot, position = (T.bind(T.cast(a[m], "int32")) for a in (slots, positions))
        cache = Cache(words, scales, (slot, T.bind(first_head // form.group)), position)
        row = Row(form, qkv, m, position)
        block = Block(form, cache, row, position if rope else position + 1, rank, warp, lane)
        own, tables, merge = None, None, Merge(block)
        if rope:
            block.ask(0)
            block.ask_bos()
            tables = row.ask_tables(Rope(*rope), lane)
            own = Own(block)
            block.put(T.int32(0))
            block.put_bos()
            merge.open()
            cuda.wait_for_launch()
            cuda.let_next_launch()
            own.compute(tables)
            own.put(T.int32(0))
            with cuda.when(first_head % form.group == 0):
                own.append()
        else:
            cuda.wait_for_launch()
            cuda.let_next_launch()
            block.ask(0)
            block.ask_bos()
            block.put(T.int32(0))
            block.put_bos()
            merge.open()
        with cuda.when(block.unit == 0):
            block.load_query(first_head + block.h, tables)
        block.start()
        with T.serial(block.rounds) as round_:
            with cuda.when(round_ > 0):
                cuda.sync()  # nobody reads the last round's rows any more
                block.put(round_)
                if own:
                    cuda.sync()
                    own.put(round_)
            cuda.sync()
            if own:
                own.set_scales(round_)
            block.ask(round_ + 1)
            block.attend(round_)
        merge.finish(y, m, first_head)

    with cuda.cluster(BLOCKS) as rank:
        with cuda.blocks(form.num_heads // form.heads, "y") as g, cuda.blocks(rows, "z") as m:
            with cuda.threads(form.warps, "y") as warp, cuda.threads(cuda.WARP) as lane:
                emit(rank, g, m, warp, lane)
