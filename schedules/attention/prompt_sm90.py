"""attention of many rows on Hopper: prompt_cuda.py's tiles, over levels unpacked before.

    levels = unpacked cache                          levels_sm90.py, a launch of its own
    for kv_head, m0, z in Hkv, M/R, Z:               blockIdx; the longest contexts first
        for run in rows of one slot, every Z-th:     mostly one
            q8 = quantize(q)                         shared
            for b in blocks of 64 positions:
                levels(b + A) -> shared              one bulk copy; a barrier of bytes
                dots, p, unit, o, total              prompt_tile_cuda.py, softmax_cuda.py
            y = o / total

    tile | value  | bound by
    W    | 4      | warps of a block, 2 or, for many rows, 3 blocks a multiprocessor: 255 or 168
         |        | registers, and nothing but barriers of bytes keeps warps in step, so that
         |        | products, float64 and shared memory of different ones overlap
    S    | 4 or 3 | stages of 20 KB: shared memory
    A    | S - 2  | steps that a copy is asked for ahead; warps may be two apart

Few rows take prompt_cuda.py's form: they may be a captured step's, whose workspace would have to
live as long as the graph.
"""

from dataclasses import replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.attention import levels_sm90, prompt_cuda
from schedules.attention.prompt_tile_cuda import (
    WARP_ROWS,
    Arrays,
    Form,
    Tile,
    each_run,
    launch_tiles,
)
from schedules.attention.softmax_cuda import KEYS
from schedules.intrin import bulk_sm90, cuda

MANY = 768  # rows that fill three blocks a multiprocessor, of four queries that share keys
FORMS = {"few": (4, 2, 4), "many": (4, 3, 3)}  # warps, blocks a multiprocessor, S


class LevelTile(Tile):
    """Attends to blocks that come by bulk copies."""

    def __init__(self, form: Form, num_stages: int, arrays: Arrays, levels, *where):
        self.num_stages, self.ahead = num_stages, num_stages - 2
        barriers = num_stages * bulk_sm90.BARRIER_BYTES
        used = form.query_bytes + num_stages * form.block_bytes + 2 * barriers
        super().__init__(form, arrays, used, *where)
        self.levels = levels
        self.stages = T.bind(self.queries + T.uint32(form.query_bytes))
        self.full = T.bind(self.stages + T.uint32(num_stages * form.block_bytes))
        self.empty = T.bind(self.full + T.uint32(barriers))
        self.asked = cuda.local("int32", 1)  # blocks of all runs so far
        cuda.store(self.asked, T.int32(0), 0)
        with cuda.when(self.t == 0):
            for stage in range(num_stages):
                at = T.uint32(stage * bulk_sm90.BARRIER_BYTES)
                bulk_sm90.make(self.full + at, 1)
                bulk_sm90.make(self.empty + at, form.warps * cuda.WARP)

    def attend(self, run: Expr) -> None:
        """The rows of a run: its slot's blocks, up to the last position."""
        begin, end = self.start_run(run)
        blocks, before = T.bind(self.last // KEYS + 1), T.bind(self.asked[0])
        for b in range(self.ahead):
            self._ask(T.int32(b), blocks, before)
        b = cuda.local("int32", 1)
        cuda.store(b, T.int32(0), 0)
        with T.While(b[0] < blocks):
            self._attend_block(T.bind(b[0]), blocks, before)
            cuda.store(b, b[0] + 1, 0)
        cuda.store(self.asked, before + blocks, 0)
        self.write(begin, end)

    def _attend_block(self, b: Expr, blocks: Expr, before: Expr) -> None:
        form, number = self.form, T.bind(before + b)
        self._ask(b + self.ahead, blocks, before)
        stage = self._stage(number)
        bulk_sm90.wait(self._barrier(self.full, number), number // self.num_stages % 2)
        self.multiply_keys(stage)
        self.softmax.step(T.bind(b * KEYS), T.bind(stage + T.uint32(form.level_bytes)))
        self.multiply_values(T.bind(stage + T.uint32(form.key_bytes)))
        # Every lane: racecheck does not take one lane's arrival for the other lanes' reads
        bulk_sm90.arrive(self._barrier(self.empty, number))

    def _ask(self, b: Expr, blocks: Expr, before: Expr) -> None:
        """For a block of the run, once every warp is done with the one that was in its stage."""
        form, number = self.form, T.bind(before + b)
        with cuda.when(tirx.all(self.t == 0, b < blocks)):
            with cuda.when(b >= self.num_stages):
                parity = (number // self.num_stages + 1) % 2
                bulk_sm90.wait(self._barrier(self.empty, number), parity)
            first = levels_sm90.first_byte(form, self.arrays, self.where, T.cast(b, "int64"))
            full = self._barrier(self.full, number)
            bulk_sm90.expect(full, form.block_bytes)
            source = T.address_of(self.levels[first])
            bulk_sm90.copy(self._stage(number), source, form.block_bytes, full)

    def _stage(self, number: Expr) -> Expr:
        return T.bind(
            self.stages + T.cast(number % self.num_stages * self.form.block_bytes, "uint32")
        )

    def _barrier(self, first: Expr, number: Expr) -> Expr:
        return T.bind(first + T.cast(number % self.num_stages * bulk_sm90.BARRIER_BYTES, "uint32"))


def launch(step_rows: int, form: Form, *tensors) -> None:
    """Tensors as in `Arrays`. A captured step, of `step_rows` at most, takes no workspace."""
    rows = Arrays(*tensors).rows
    with T.If(rows <= step_rows):
        with T.Then():
            prompt_cuda.launch(form, *tensors)
        with T.Else(), T.If(rows < MANY):
            for name, branch in zip(FORMS, (T.Then, T.Else), strict=True):
                with branch():
                    launch_unpacked(name, form, *tensors)


def launch_unpacked(name: str, form: Form, *tensors) -> None:
    """Two kernels, the second one of FORMS."""
    warps, blocks, num_stages = FORMS[name]
    if form.group <= warps * WARP_ROWS:
        form = replace(form, warps=warps, blocks=blocks)
    arrays = Arrays(*tensors)
    levels = T.alloc_buffer((levels_sm90.size(form, arrays),), "uint8")

    def emit(kv_head, m0, warp, lane, first: Expr, distance: Expr) -> None:
        tile = LevelTile(form, num_stages, arrays, levels, kv_head, m0, warp, lane)
        each_run(tile.find_runs(), first, distance, tile.attend)

    levels_sm90.launch(form, arrays, levels)
    launch_tiles(form, arrays.rows, emit)
