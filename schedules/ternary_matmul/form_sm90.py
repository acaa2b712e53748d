"""sm90.py's tiles: what a block takes of a GEMM, and what was measured of each form.

Times are of an H100, in ns, cold weights: of a tile beside none, or another, on its multiprocessor.
Those of C ranks include their sums through the cluster's shared memory.
"""

from dataclasses import dataclass, replace

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.targets import GpuTarget
from schedules.ternary_matmul.cuda import CHUNK, Shape

GROUP_ROWS = 64  # of weights, of a warpgroup
GROUP_THREADS = 128
SWIZZLE_BYTES = 1024  # what the 128-byte swizzle repeats after: 8 rows
Time = tuple[int, int]  # of a tile without its steps, of a step


@dataclass(frozen=True)
class Form:
    shape: Shape
    groups: int  # G
    tokens: int  # T
    stages: int  # S
    ranks: int  # C, blocks of a cluster that share a tile's columns
    blocks: int  # on a multiprocessor
    alone: Time
    together: Time
    matrices: int = 1  # of a block's groups: each has its share of them

    @property
    def threads(self) -> int:
        return self.groups * GROUP_THREADS

    @property
    def shared_bytes(self) -> int:
        return self.stages * self.stage_bytes + SWIZZLE_BYTES

    @property
    def height(self) -> int:
        """Outputs of a block: rows of each matrix."""
        return self.groups * GROUP_ROWS // self.matrices

    @property
    def columns(self) -> int:
        """Of tiles: how many have the same tokens."""
        return -(-self.shape.n // self.height)

    @property
    def token_bytes(self) -> int:
        """Of a stage, before its weights."""
        return self.tokens * CHUNK

    @property
    def stage_bytes(self) -> int:
        return self.token_bytes + 16 * self.threads

    @property
    def steps(self) -> int:
        """Chunks of every rank; those past the end meet zeros."""
        return -(-self.shape.chunks // self.ranks)

    @property
    def extra_tokens(self) -> int:
        """Of a stage that holds no chunk any more, but what the epilogue reads."""
        return -(-self.tokens // (8 * (self.stages - 2))) * 8

    @property
    def can_hold_extra(self) -> bool:
        """Rows that cp.async can copy, of a whole tile."""
        fits = self.extra_tokens * 4 * self.height <= self.stage_bytes
        return fits and self.ranks == 1 and self.shape.n % 4 == 0

    def time(self, of: Time) -> int:
        return of[0] + self.steps * of[1]

    def cost(self, rows: Expr, chip: int) -> Expr:
        """Of all tiles: rounds over the chip, the last one alone where it leaves half free."""
        blocks = T.ceildiv(rows, self.tokens) * (self.columns * self.ranks)
        rounds, rest = T.floordiv(blocks, self.blocks * chip), blocks % (self.blocks * chip)
        alone, together = (T.int64(self.time(of)) for of in (self.alone, self.together))
        last = T.Select(rest > chip, together, T.Select(rest > 0, alone, T.int64(0)))
        return rounds * together + last


def forms_of(shape: Shape, stages: int, target: GpuTarget) -> list[Form]:
    forms = [
        Form(shape, 2, 160, 8, 1, 1, (4600, 420), (4600, 420)),
        Form(shape, 2, 128, 5, 1, 2, (4900, 470), (7500, 580)),
        Form(shape, 2, 96, 6, 1, 2, (3400, 330), (6000, 510)),
        Form(shape, 2, 96, 8, 2, 1, (5800, 258), (5800, 258)),
        Form(shape, 2, 64, 8, 1, 2, (3500, 240), (5700, 360)),
        Form(shape, 2, 64, 8, 2, 2, (5600, 220), (7100, 365)),
        Form(shape, 2, 64, 8, 4, 2, (5300, 255), (6000, 440)),
        Form(shape, 2, 32, 8, 1, 2, (3400, 190), (4400, 300)),
        Form(shape, 2, 32, 8, 4, 2, (4900, 180), (5100, 320)),
    ]
    if stages:
        forms = [replace(form, stages=stages) for form in forms]
    most = max(form.shared_bytes for form in forms)
    if most > target.shared_bytes:
        raise ValueError(f"ternary_matmul: {stages} stages need {most} bytes of shared memory")
    return forms
