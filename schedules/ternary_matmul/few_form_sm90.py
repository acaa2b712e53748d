"""few_tokens_sm90.py's sizes: how tiles and columns are shared out, what lies where in memory."""

from dataclasses import dataclass

from schedules.intrin import bulk_sm90 as bulk
from schedules.intrin import cuda
from schedules.targets import GpuTarget
from schedules.ternary_matmul.cuda import CHUNK, CHUNK_BYTES, TILE, Shape

GROUP = 8  # tokens of a product
RANKS = (1, 2, 4)  # S
MOST_TOKEN_BYTES = 32 * 1024  # of a block, where S allows
MAX_WARPS = 16
MOST_TILES = 32  # of a block: a lane asks for one
ALIGN = 128
GAP = 16  # bytes between rows of tokens, 4 words between rows of sums: for the banks
PIECE = 16  # bytes of a copy of tokens


@dataclass(frozen=True)
class Form:
    """T, S and the number of clusters; the rest follows."""

    shape: Shape
    tokens: int  # T
    ranks: int  # S
    clusters: int

    @property
    def tiles(self) -> int:
        """P, at most."""
        return -(-self.shape.tiles // self.clusters)

    @property
    def chunks(self) -> int:
        """C, at most."""
        return -(-self.shape.chunks // self.ranks)

    @property
    def together(self) -> int:
        """R"""
        return min(2, self.tiles)

    @property
    def across(self) -> int:
        """V"""
        return -(-self.tiles // self.together)

    @property
    def warps(self) -> int:
        """W. Two at least of V W: the number of an only one would be a constant, too."""
        return max(min(MAX_WARPS // self.across, self.chunks), 2 if self.across == 1 else 1)

    @property
    def block_warps(self) -> int:
        return self.across * self.warps

    @property
    def threads(self) -> int:
        return self.block_warps * cuda.WARP

    @property
    def groups(self) -> int:
        return self.tokens // GROUP

    @property
    def pitch(self) -> int:
        """Bytes from one token to the next."""
        return self.chunks * CHUNK + GAP

    @property
    def weights_bytes(self) -> int:
        return self.tiles * self.chunks * CHUNK_BYTES

    @property
    def height(self) -> int:
        """Outputs of a cluster."""
        return self.tiles * TILE

    @property
    def own_height(self) -> int:
        """Outputs of a block."""
        return self.height // self.ranks

    @property
    def steps(self) -> int:
        """Outputs of a thread."""
        return -(-self.tokens * self.own_height // self.threads)

    @property
    def sums_pitch(self) -> int:
        """Bytes from one token's sums to the next's, of all warps' tiles."""
        return 4 * self.across * self.together * TILE + GAP

    @property
    def inbox(self) -> int:
        """Behind weights and tokens, in whose place the warps' sums are."""
        sums = self.warps * self.tokens * self.sums_pitch
        return -(-max(self.weights_bytes + self.tokens * self.pitch, sums) // ALIGN) * ALIGN

    @property
    def barriers(self) -> int:
        """One for every R tiles, then the inbox's."""
        inbox = self.ranks * self.tokens * self.own_height * 4 if self.ranks > 1 else 0
        return self.inbox + inbox

    @property
    def scales(self) -> int:
        """Of the tokens, then of the block's outputs."""
        return -(-(self.barriers + (1 + self.across) * bulk.BARRIER_BYTES) // PIECE) * PIECE

    @property
    def shared_bytes(self) -> int:
        return self.scales + 4 * (self.tokens + self.own_height)


def form_of(shape: Shape, tokens: int, target: GpuTarget) -> Form | None:
    """The least S that leaves a block few tokens; None where no tile fits beside them."""
    possible = [
        form
        for ranks in RANKS
        if ranks <= shape.chunks and (form := share_out(shape, tokens, ranks, target))
    ]
    small = (form for form in possible if tokens * shape.k <= form.ranks * MOST_TOKEN_BYTES)
    return next(small, possible[-1] if possible else None)


def share_out(shape: Shape, tokens: int, ranks: int, target: GpuTarget) -> Form | None:
    """A cluster for every `ranks` multiprocessors, or several where its tiles would leave none of
    the shared memory to the next launch's."""
    at_once, room = target.num_multiprocessors // ranks, target.shared_bytes // 2 - 2 * ALIGN
    form = Form(shape, tokens, ranks, min(at_once, shape.tiles))
    while form.tiles > MOST_TILES or (form.shared_bytes > room and form.tiles > 1):
        form = Form(shape, tokens, ranks, form.clusters + at_once)
    even = Form(shape, tokens, ranks, -(-shape.tiles // form.tiles))
    return even if even.shared_bytes <= room else None
