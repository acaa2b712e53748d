"""few_tokens_sm90.py's sizes: how tiles and columns are shared out, what lies where in memory."""

from dataclasses import dataclass, replace

from schedules.intrin import bulk_sm90 as bulk
from schedules.intrin import cuda
from schedules.targets import GpuTarget
from schedules.ternary_matmul.cuda import CHUNK, CHUNK_BYTES, TILE, Shape

GROUP = 8  # tokens of a product
RANKS = (1, 2, 4)  # S
PEERS = 2  # X, of blocks that would each read many tokens
MOST_COLUMNS = {4: 8192, 8: 4096, 16: 4096}  # of a block, by the most rows of a launch
MOST_READ_BYTES = 10 * 2**20  # of tokens, by all blocks
MAX_WARPS = 16
MOST_TILES = 32  # of a block: a lane asks for one
MOST_SUMS = 64  # tokens times tiles of a warp: registers
MOST_STEPS = 4  # that are written out one by one
MOST_PARTS = 2  # of tokens that come from a bulk copy each
ALIGN = 128
GAP = 16  # bytes between rows of tokens, 4 words between rows of sums: for the banks
PIECE = 16  # bytes of a copy of tokens


@dataclass(frozen=True)
class Form:
    """Four numbers; the rest follows. A cluster has `ranks` blocks for each of its `peers`."""

    shape: Shape
    tokens: int  # columns of a product, whatever the rows
    ranks: int  # blocks that share out the chunks of K of the same tiles
    peers: int  # blocks that share tokens, each with tiles of its own
    clusters: int

    @property
    def cluster(self) -> int:
        """Blocks of one."""
        return self.ranks * self.peers

    @property
    def shares(self) -> int:
        """Of the tiles."""
        return self.clusters * self.peers

    @property
    def tiles(self) -> int:
        """Tiles of 16 outputs of a block, at most."""
        return -(-self.shape.tiles // self.shares)

    @property
    def chunks(self) -> int:
        """Chunks of 128 columns of a block, at most."""
        return -(-self.shape.chunks // self.ranks)

    @property
    def has_own_tokens(self) -> bool:
        """Whether a warp brings the tokens of its chunks itself: all tiles are one warp's."""
        return self.peers == 1 and self.across == 1 and self.steps <= MOST_STEPS

    @property
    def together(self) -> int:
        """Tiles of a warp: all of the block's, or two, so that one at most is beyond the block's
        last: what is read there are tokens."""
        return self.tiles if self.tokens * self.tiles <= MOST_SUMS else 2

    @property
    def across(self) -> int:
        """Groups of tiles of a block, each for warps of its own."""
        return -(-self.tiles // self.together)

    @property
    def warps(self) -> int:
        """Warps that share out the chunks of one group of tiles: as few as need no further step.
        A block has two warps at least: of a single one threadIdx.y is the constant 0, and the
        kernel binds expressions of it to variables."""
        least = 2 if self.across == 1 else 1
        most = max(min(MAX_WARPS // self.across, self.chunks), least)
        return max(-(-self.chunks // -(-self.chunks // most)), least)

    @property
    def steps(self) -> int:
        """Chunks of a warp."""
        return -(-self.chunks // self.warps)

    @property
    def parts(self) -> int:
        """Of shared tokens: a warp waits for those of its step, or of all."""
        return self.steps if self.steps <= MOST_PARTS else 1

    @property
    def part_chunks(self) -> int:
        return self.warps if self.parts > 1 else self.chunks

    @property
    def is_even(self) -> bool:
        """Whether every warp has a chunk in every step."""
        return self.shape.chunks == self.ranks * self.warps * self.steps

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
    def read_bytes(self) -> int:
        """Of tokens, by all blocks."""
        return self.clusters * self.peers * self.tokens * self.shape.k

    @property
    def height(self) -> int:
        """Outputs of a cluster's ranks."""
        return self.tiles * TILE

    @property
    def own_height(self) -> int:
        """Outputs of a block."""
        return self.height // self.ranks

    @property
    def rounds(self) -> int:
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
        """One for each group of tiles, the inbox's, then one for every part of the tokens."""
        inbox = self.ranks * self.tokens * self.own_height * 4 if self.ranks > 1 else 0
        return self.inbox + inbox

    @property
    def scales(self) -> int:
        """Of the tokens, then of the block's outputs."""
        count = self.across + 1 + self.parts
        return -(-(self.barriers + count * bulk.BARRIER_BYTES) // PIECE) * PIECE

    @property
    def shared_bytes(self) -> int:
        return self.scales + 4 * (self.tokens + self.own_height)


def form_of(shape: Shape, most_rows: int, target: GpuTarget) -> Form | None:
    """For up to 4, 8 or 16 rows: the fewest ranks that leave a block few columns and all blocks few
    tokens to read, or else few columns; None where no tile fits beside a block's tokens."""
    tokens = tokens_of(most_rows)
    possible = [
        form
        for ranks in RANKS
        if ranks <= shape.chunks
        if (form := share_out(shape, tokens, ranks, peers_of(shape, tokens, ranks), target))
    ]
    few = [form for form in possible if shape.k <= form.ranks * MOST_COLUMNS[most_rows]]
    quick = (form for form in few if form.read_bytes <= MOST_READ_BYTES)
    return next(quick, few[0] if few else possible[-1] if possible else None)


def tokens_of(most_rows: int) -> int:
    """Whole products' columns for so many rows: 8 or 16."""
    return -(-most_rows // GROUP) * GROUP


def peers_of(shape: Shape, tokens: int, ranks: int) -> int:
    """Of two measures against many tokens in a block, one."""
    return PEERS if tokens > GROUP and ranks == 1 and shape.tiles >= PEERS else 1


def share_out(shape: Shape, tokens: int, ranks: int, peers: int, target: GpuTarget) -> Form | None:
    """A block for every multiprocessor, or several where its tiles would leave none of the shared
    memory to the next launch's."""
    at_once = target.num_multiprocessors // (ranks * peers)
    room = target.shared_bytes // 2 - 2 * ALIGN
    form = Form(shape, tokens, ranks, peers, min(at_once, -(-shape.tiles // peers)))
    while form.tiles > MOST_TILES or (form.shared_bytes > room and form.tiles > 1):
        form = replace(form, clusters=form.clusters + at_once)
    even = replace(form, clusters=-(-shape.tiles // (form.tiles * peers)))
    return even if even.shared_bytes <= room else None
