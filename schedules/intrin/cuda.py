"""Blocks and threads of a CUDA kernel, and what they do together: reductions, scans, products.

Plain Python emitters for the body of a TVMScript kernel. A reduction's result is known to every
thread that asked. Rows M may be none, and a grid of no blocks is an error to CUDA, so a kernel
launches inside `some_rows(rows)`.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import Buffer

WARP = 32
MAX_THREADS = 1024
FULL_MASK = 0xFFFFFFFF
WAIT = "griddepcontrol.wait"
WAITS_ITSELF = "bitnet.waits_itself"  # attribute: every launch calls `wait_for_launch`
SWIZZLE_128 = 1
ROWS_8_BYTES = 8 * 128  # from one group of 8 rows to the next


def blocks(count: Expr | int, axis: str = "x"):
    return T.thread_binding(count, thread=f"blockIdx.{axis}")


def threads(count: int, axis: str = "x"):
    return T.thread_binding(count, thread=f"threadIdx.{axis}")


@contextmanager
def cluster(count: int) -> Iterator[Expr]:
    """The rank of a block in its cluster of `count`, which are all blocks along x."""
    with T.thread_binding(count, thread="clusterCtaIdx.x"), blocks(count) as rank:
        yield rank


def wait_for_launch() -> None:
    """The launch before this one has ended and can be seen; so have, by their own wait, all others
    before it. A PrimFunc all of whose launches say it has the attribute WAITS_ITSELF; the pass
    LaunchEarly adds it to others. Hopper and later."""
    ptx(WAIT)


def let_next_launch() -> None:
    """The launch after this one may start once every block has said so."""
    ptx("griddepcontrol.launch_dependents")


def some_rows(rows: Expr):
    return when(rows > 0)


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """One frame where `T.If` and `T.Then` are two."""
    with T.If(condition), T.Then():
        yield


def min_blocks(count: int):
    """Registers for this many blocks on a multiprocessor; around a kernel's body."""
    return T.attr(T.int32(0), "tirx.launch_bounds_min_blocks_per_sm", count)


def both(a: Expr, b: Expr) -> Expr:
    return tirx.all(a, b)


@contextmanager
def strided(count: int, t: Expr, num_threads: int) -> Iterator[Expr]:
    """i = t, t + num_threads, ... below `count`."""
    with T.serial(-(-count // num_threads)) as step:
        i = step * num_threads + t
        if count % num_threads == 0:
            yield i
        else:
            with when(i < count):
                yield i


def unrolled(count: int):
    """A loop that nvcc unrolls: TVM's simplifier takes minutes over long code of its own making."""
    return T.unroll(count, annotations={"pragma_unroll_explicit": False})


def threads_for(count: int, most: int) -> int:
    """Whole warps for `count` items, at most `most` threads."""
    return min(most, -(-count // WARP) * WARP)


def sync() -> None:
    T.evaluate(T.tvm_storage_sync("shared"))


def sync_cluster() -> None:
    """A barrier of all blocks of a cluster, for their shared memory too."""
    ptx("barrier.cluster.arrive.release.aligned")
    ptx("barrier.cluster.wait.acquire.aligned")


def local(dtype: str, *shape: int) -> Buffer:
    return T.alloc_buffer(shape, dtype, scope="local")


def shared(dtype: str, *shape: int) -> Buffer:
    return T.alloc_buffer(shape, dtype, scope="shared")


def store(buffer: Buffer, value: Expr, *indices) -> None:
    T.buffer_store(buffer, value, list(indices))


def offset(value: Expr) -> Expr:
    """An int32 that is not negative, for an address of shared memory: TVM dies of a cast where it
    does not see that. No constant: TVM would print its address."""
    return T.reinterpret("uint32", value)


def pinned(value: Expr) -> Expr:
    """An int32 or uint32 in a register, worked out here: TVM writes an expression out wherever it
    is part of an index, in 64 bits, and nvcc puts it off until it is used, behind a wait."""
    word, own = local("uint32", 1), local("uint32", 1)
    store(word, T.reinterpret("uint32", value), 0)
    ptx("prmt.b32", own[0], word[0], word[0], T.uint32(0x3210))
    return T.reinterpret(str(value.ty.dtype), own[0])


def warp_reduce(value: Expr, op: str, width: int = WARP) -> Expr:
    """sum, max or min of `width` neighbouring lanes."""
    return T.bind(T.cuda.warp_reduce(value, op, width))


def warp_count(value: Expr) -> Expr:
    """Sum of the lanes' int32, by one instruction."""
    total = T.cuda.reduce_add_sync_u32(T.uint32(FULL_MASK), T.reinterpret("uint32", value))
    return T.bind(T.reinterpret("int32", T.bind(total)))


def warp_any(condition: Expr) -> Expr:
    """Whether it holds in any lane; all of them then branch alike."""
    found = T.call_pure_extern(
        "int32", "__any_sync", T.uint32(FULL_MASK), T.cast(condition, "int32")
    )
    return T.bind(found) != 0


def shuffle(value: Expr, lane: Expr | int) -> Expr:
    """The value that `lane` has."""
    return T.tvm_warp_shuffle(T.uint32(FULL_MASK), value, lane, WARP, WARP)


def shuffle_up(value: Expr, offset: int) -> Expr:
    return T.tvm_warp_shuffle_up(T.uint32(FULL_MASK), value, offset, WARP, WARP)


def shuffle_xor(value: Expr, lanes: int) -> Expr:
    return T.tvm_warp_shuffle_xor(T.uint32(FULL_MASK), value, lanes, WARP, WARP)


def to_bits(value: Expr) -> Expr:
    """A number of 32 or 64 bits in an int64."""
    bits = str(value.ty.dtype).lstrip("float").lstrip("int")
    return T.cast(T.reinterpret(f"int{bits}", value), "int64")


def from_bits(bits: Expr, dtype: str) -> Expr:
    return T.reinterpret(dtype, T.cast(bits, "int32" if dtype.endswith("32") else "int64"))


class Scratch:
    """Shared memory of a block's reductions: 64 bits a warp, for numbers of any kind.

    One buffer for all uses, with a barrier between them: TVM lets buffers of different lives share
    memory, finds that they then need barriers, and refuses to insert one below an `if`.
    """

    def __init__(self, t: Expr, num_threads: int):
        self.t, self.warps = t, num_threads // WARP
        self.buffer = shared("int64", self.warps)
        self.is_used = False

    def share(self, partial: Expr) -> Callable[[Expr | int], Expr]:
        """Every warp's partial value, by warp; the lane that holds it is the last."""
        if self.warps == 1:  # also within a loop, where the first use follows the last one
            only = T.bind(shuffle(partial, WARP - 1))
            return lambda warp: only
        if self.is_used:
            sync()
        self.is_used = True
        with when(self.t % WARP == WARP - 1):
            store(self.buffer, to_bits(partial), self.t // WARP)
        sync()
        return lambda warp: from_bits(self.buffer[warp], str(partial.ty.dtype))

    def of_lane(self, of_warp: Callable[[Expr | int], Expr], neutral: Expr) -> Expr:
        """The partial value of the warp whose number is the lane's."""
        lane = self.t % WARP
        value = of_warp(T.min(lane, self.warps - 1))
        return T.bind(T.Select(lane < self.warps, value, neutral))

    def reduce(self, value: Expr, op: str) -> Expr:
        """sum or max (of what is not negative) over the block's threads."""
        return self.reduce_by(lambda value: warp_reduce(value, op), value)

    def reduce_by(self, of_warp: Callable[[Expr], Expr], value: Expr) -> Expr:
        """The same by what makes one number of a warp's, of which 0 is neutral."""
        partial = of_warp(value)
        if self.warps == 1:
            return partial
        zero = T.cast(0, str(partial.ty.dtype))
        return of_warp(self.of_lane(self.share(partial), zero))

    def scan(self, value: Expr) -> tuple[Expr, Expr]:
        """(sum of the int32 values of earlier threads, sum of all)."""
        earlier, within, total = self._scan(value)
        return earlier + within - value, total

    def running_sum(self, value: Expr) -> Expr:
        """Sum of the values of the threads up to this one."""
        earlier, within, _ = self._scan(value)
        return earlier + within

    def _scan(self, value: Expr) -> tuple[Expr, Expr, Expr]:
        """Sums of earlier warps, of the warp's lanes up to this one, of all."""
        zero = T.cast(0, str(value.ty.dtype))
        within = self._scan_warp(value)
        of_warp = self.share(within)
        warps = self._scan_warp(self.of_lane(of_warp, zero))
        this = T.bind(self.t // WARP)
        earlier = T.bind(shuffle(warps, T.max(this - 1, 0)))
        total = T.bind(shuffle(warps, self.warps - 1))
        return T.Select(this > 0, earlier, zero), within, total

    def _scan_warp(self, value: Expr) -> Expr:
        running = local(str(value.ty.dtype), 1)
        store(running, value, 0)
        for step in (1, 2, 4, 8, 16):
            other = T.bind(shuffle_up(running[0], step))
            with when(self.t % WARP >= step):
                store(running, running[0] + other, 0)
        return T.bind(running[0])


def dp4a(a: Expr, b: Expr, acc: Expr) -> Expr:
    """acc + the products of four signed bytes, all int32."""
    return T.call_pure_extern("int32", "__dp4a", a, b, acc)


def dp4a_unsigned(a: Expr, b: Expr, acc: Expr) -> Expr:
    """acc + the products of four unsigned bytes, all uint32."""
    return T.call_pure_extern("uint32", "__dp4a", a, b, acc)


def byte_permute(a: Expr, b: Expr, selector: Expr | int) -> Expr:
    """Four bytes out of the eight of a (0 to 3) and b (4 to 7), the lowest digit first."""
    if isinstance(selector, int):
        selector = T.uint32(selector)
    return T.call_pure_extern("uint32", "__byte_perm", a, b, selector)


def transpose_bytes(words: Sequence[Expr]) -> list[Expr]:
    """Word i of the result holds byte i of each of four words."""
    a, b, c, d = words
    words = []
    for selector in (0x5140, 0x7362):
        first, second = (T.bind(byte_permute(x, y, selector)) for x, y in ((a, b), (c, d)))
        words += [T.bind(byte_permute(first, second, half)) for half in (0x5410, 0x7632)]
    return words


def float64(value: float) -> Expr:
    """A constant: TVM prints those of CUDA with fifteen decimals, whatever their size."""
    return T.reinterpret("float64", T.int64(struct.unpack("<q", struct.pack("<d", value))[0]))


# PTX, by address: TVM sees no access to the memory and inserts no barrier.


def ptx(instruction: str, *operands, **options) -> None:
    T.evaluate(T.ptx[instruction](*operands, **options))


def shared_bytes(size: int) -> Expr:
    """The address of `size` bytes of the block's dynamic shared memory; one call a kernel.

    By its data: TVM shrinks a buffer to the elements that it sees accessed. The root block then has
    to say `T.reads()` and `T.writes()` itself.
    """
    memory = T.alloc_buffer((size,), "uint8", scope="shared.dyn")
    return T.bind(T.cuda.cvta_generic_to_shared(memory.data))


def load_16_bytes(registers: Buffer, first: int, address: Expr, **options) -> None:
    """registers[first : first + 4], uint32, of weights that nobody else on the chip reads soon."""
    four = [registers[first + i] for i in range(4)]
    ptx("ld.global.nc.L1::no_allocate.v4.b32", *four, address, **options)


def load_in_order(value: Buffer, first: int, source: Expr, lanes: int = 1) -> None:
    """value[first : first + lanes] = float32 from `source` on, neither before a `wait_for_launch`
    in front of it nor after one behind: what no store of the kernel may change, nvcc loads where it
    likes. Not by way of L1, which may hold what was there before the launch before."""
    vector = {1: "", 4: ".v4"}[lanes]
    ptx(
        f"ld.global.cg{vector}.f32", *(value[first + i] for i in range(lanes)), T.address_of(source)
    )


def copy_16_bytes(destination: Expr, source: Expr, valid: Expr | int = 16) -> None:
    """To shared memory, asynchronously; bytes from `valid` on are zeros."""
    ptx("cp.async.cg.shared.global", destination, source, 16, T.cast(valid, "uint32"))


def copy_bytes(destination: Expr, source: Expr, size: int, valid: Expr) -> None:
    """The same of 4, 8 or 16 bytes, through L1."""
    ptx("cp.async.ca.shared.global", destination, source, size, T.cast(valid, "uint32"))


def wait_for_copies(pending: int = 0) -> None:
    """All but the last `pending` groups of this thread's copies are done."""
    ptx("cp.async.wait_group", pending)


def commit_copies() -> None:
    ptx("cp.async.commit_group")


def load_matrices(registers: Buffer, first: int, address: Expr) -> None:
    """registers[first : first + 4]: four 8 x 16 byte matrices, lane l at row l % 8 of l / 8."""
    four = [registers[first + i] for i in range(4)]
    ptx("ldmatrix.sync.aligned.m8n8.x4.shared.b16", *four, address)


def multiply(
    acc: Buffer,
    first: Expr | int,
    a: Sequence[Expr],
    b: Sequence[Expr],
    b_dtype: str = "s8",
    is_first: bool = False,
) -> None:
    """acc[first : first + 4] += a . b: 16 x 32 signed bytes times 32 x 8, signed or unsigned.

    `is_first`: = in place of +=.
    """
    d = [acc[first + i] for i in range(4)]
    c = [T.uint32(0)] * 4 if is_first else d
    ptx(f"mma.sync.aligned.m16n8k32.row.col.s32.s8.{b_dtype}.s32", *d, *a, *b, *c)


def transpose_matrix(word: Expr) -> Expr:
    """Of an 8 x 8 matrix of 16 bits, two neighbours of row l / 4 in lane l's word."""
    turned = local("uint32", 1)
    ptx("movmatrix.sync.aligned.m8n8.trans.b16", turned[0], word)
    return turned[0]


def reciprocal(value: Expr) -> Expr:
    """1 / value within two ulp, of a normal float64 whose inverse is one."""
    inverse = local("float64", 1)
    ptx("rcp.approx.ftz.f64", inverse[0], value)
    for _ in range(2):  # 20 bits, 40, all
        error = T.call_pure_extern("float64", "fma", -value, inverse[0], float64(1))
        better = T.call_pure_extern("float64", "fma", inverse[0], T.bind(error), inverse[0])
        store(inverse, better, 0)
    return T.bind(inverse[0])


def multiply_int4(acc: Buffer, first: int, a: Sequence[Expr], b: Sequence[Expr]) -> None:
    """acc[first : first + 4] += a . b: 16 x 64 signed nibbles times 64 x 8.

    One instruction of sm_80 to sm_89; later archs unpack and multiply bytes, 190 instructions.
    """
    c = [acc[first + i] for i in range(4)]
    ptx("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32", *c, *a, *b, *c)


def swizzled_matrix(address: Expr) -> Expr:
    """wgmma's descriptor of a K-major matrix of 128-byte rows under the 128-byte swizzle.

    https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
    """
    layout = SWIZZLE_128 << 62 | ROWS_8_BYTES >> 4 << 32 | 1 << 16
    start = T.shift_right(address & T.uint32(0x3FFFF), T.uint32(4))
    return T.cast(start, "uint64") | T.uint64(layout)
