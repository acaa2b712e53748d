"""sample on CUDA; what runtime/sampler.py does, without the logits leaving the GPU. Two launches.

    for 8 groups g of G, m in M:                     blockIdx.x, threadIdx.y; blockIdx.y
        best[m, g] = largest logit of the group      a warp; all of the chip reads the row once
    for m in M:                                      blockIdx.x
        if temperature is 0 or top_k is 1: the largest of them, and no more
        bound = the top_k-th largest of best         as many logits reach it, or more
                or of 128 of 8 groups each           up to top_k 64, by counting which are larger
        list of (logit, id) that reach bound         a warp a group whose best does
        in order, the largest first,                 up to 128 of them by counting, else bitonic,
                  ties to the lower id               in shared memory
        p[i] = exp((logit[i] - max) / temperature)   float64, i < top_k
        sums = running sums of p
        size = the first i with sums[i] >= top_p * sums[top_k - 1], that one included
        token = the id of the first i with sums[i] > uniform * sums[size - 1]

    tile    | value | bound by
    GROUPS  | 1024  | G; top_k at most, as the bound is the best of one of them
    THREADS | 1024  | of the second launch: one a group
    LISTED  | 2048  | 16 KB to sort; logits that tie with the bound can be more

A result below 0 is no token: NOT_FINITE if the largest logit is no number, TOO_MANY if the row is
the host's to sample (top_k of 0 or above 1024, or more logits than LISTED reach the bound: of
128256 Gaussian ones from a top_k of some 880 on, by a count in numpy).
Logits order as integers of the same bits, once negative ones have theirs flipped; what is no number
comes first, whatever its sign.

One block for all, three reads of 128256 logits and some 50 steps of sorting for the 40 likeliest,
took 69 us on an H100.
"""

from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.targets import GpuTarget

GROUPS = THREADS = 1024  # whole warps, as many as lanes: `reduce_by` has no lane to fill with 0
WARPS = 8  # of a block of the first launch
LISTED = 2048
NOT_FINITE, TOO_MANY = -1, -2
LOW_32 = 0xFFFFFFFF
INFINITE = 0x7F800000  # the bits of a float32; what lies above is no number
NOT_A_NUMBER = 0x7FC00000
LAST = -(1 << 63)  # sorts behind every entry
FEW = 128  # entries that are put in order by counting
SHARE = THREADS // FEW  # threads that count for one


def entry_of(logit: Expr, token: Expr) -> Expr:
    """int64 that rises with the logit, then falls with the token."""
    bits = T.reinterpret("int32", T.if_then_else(logit == T.float32(0), T.float32(0), logit))
    is_number = (bits & T.int32(0x7FFFFFFF)) <= T.int32(INFINITE)
    bits = T.bind(T.if_then_else(is_number, bits, T.int32(NOT_A_NUMBER)))
    order = T.bind(bits ^ (T.shift_right(bits, 31) & T.int32(0x7FFFFFFF)))
    high = T.shift_left(T.cast(order, "int64"), T.int64(32))
    return T.bind(high | (T.int64(LOW_32) - T.cast(token, "int64")))


def entries_of(logits, vocab: int, m: Expr, group: Expr, lane: Expr) -> list[Expr]:
    """The lane's of a group, LAST past its end; groups differ by one logit at most."""

    def first_of(group: Expr) -> Expr:
        return T.bind(T.cast(T.cast(group, "int64") * vocab // GROUPS, "int32"))

    first, end, most = first_of(group), first_of(group + 1), -(-vocab // GROUPS)
    tokens = [T.bind(first + i + lane) for i in range(0, most, cuda.WARP)]
    loaded = cuda.local("float32", len(tokens))  # all on their way before one is looked at
    for i, token in enumerate(tokens):
        cuda.store(loaded, logits[m, T.min(token, vocab - 1)], i)
    return [
        T.bind(T.if_then_else(token < end, entry_of(loaded[i], token), T.int64(LAST)))
        for i, token in enumerate(tokens)
    ]


def logit_of(entry: Expr) -> Expr:
    order = T.bind(T.cast(T.shift_right(entry, T.int64(32)), "int32"))
    return T.reinterpret("float32", order ^ (T.shift_right(order, 31) & T.int32(0x7FFFFFFF)))


def token_of(entry: Expr) -> Expr:
    return T.int64(LOW_32) - (entry & T.int64(LOW_32))


def largest_of(value: Expr, lanes: int = cuda.WARP) -> Expr:
    """The largest int64 of this many neighbouring lanes, known to each."""
    most = cuda.local("int64", 1)
    cuda.store(most, value, 0)
    while lanes > 1:
        lanes //= 2
        other = T.bind(cuda.shuffle_xor(most[0], lanes))
        cuda.store(most, T.max(most[0], other), 0)
    return T.bind(most[0])


def swap_into_order(entries, t: Expr, doublings: Expr) -> None:
    """entries[: 2^doublings] sorted, the largest first; every thread compares a pair."""
    with T.serial(doublings) as size, T.serial(size + 1) as step:
        cuda.sync()
        stride = T.bind(T.shift_left(T.int32(1), size - step))
        i = T.bind(T.truncdiv(t, stride) * (2 * stride) + T.truncmod(t, stride))
        low, high = T.bind(entries[i]), T.bind(entries[i + stride])
        falls = T.bind(T.truncmod(T.shift_right(i, size + 1), 2) == 0)
        cuda.sync()
        with cuda.when((low < high) == falls):
            cuda.store(entries, high, i)
            cuda.store(entries, low, i + stride)
    cuda.sync()


def doublings_of(count: Expr) -> Expr:
    """The least d with 2^d >= count, at most that of LISTED."""
    steps: Any = T.int32(0)
    for d in range(LISTED.bit_length() - 1):
        steps = steps + T.cast(count > T.int32(1 << d), "int32")
    return T.bind(steps)


def count_larger(entries, t: Expr) -> tuple[Expr, Expr]:
    """(one of the first FEW entries, how many of them are larger); SHARE threads have the same."""
    own, part = T.bind(entries[t // SHARE]), t % SHARE
    larger = cuda.local("int32", 1)
    cuda.store(larger, T.int32(0), 0)
    with cuda.unrolled(FEW // SHARE) as i:
        is_larger = entries[i * SHARE + part] > own
        cuda.store(larger, larger[0] + T.cast(is_larger, "int32"), 0)
    lanes = SHARE
    while lanes > 1:
        lanes //= 2
        other = T.bind(cuda.shuffle_xor(larger[0], lanes))
        cuda.store(larger, larger[0] + other, 0)
    return own, T.bind(larger[0])


def find_bound(entries, bound, best: Expr, keep: Expr, t: Expr) -> Expr:
    """The keep-th largest best of a group, or of SHARE groups where those are twice as many."""
    of_several = largest_of(best, SHARE)
    with cuda.when(t == 0):
        cuda.store(bound, T.int64(LAST), 0)
    with T.If(2 * keep <= FEW):
        with T.Then():
            with cuda.when(t % SHARE == 0):
                cuda.store(entries, of_several, t // SHARE)
            cuda.sync()
            own, larger = count_larger(entries, t)
            with cuda.when(larger == T.max(keep, 1) - 1):
                cuda.store(bound, own, 0)
        with T.Else():
            for half in range(LISTED // THREADS):
                other = best if half == 0 else T.int64(LAST)
                cuda.store(entries, other, half * THREADS + t)
            swap_into_order(entries, t, T.int32(GROUPS.bit_length() - 1))
            with cuda.when(t == 0):
                cuda.store(bound, entries[T.min(keep, GROUPS) - 1], 0)
    cuda.sync()
    return T.bind(bound[0])


def list_candidates(entries, logits, vocab: int, m, best: Expr, bound: Expr, t) -> Expr:
    """entries = those from the bound on, in any order, LAST behind them; how many there are, LISTED
    or not."""
    for half in range(LISTED // THREADS):
        cuda.store(entries, T.int64(LAST), half * THREADS + t)
    groups, counts = cuda.shared("int32", GROUPS), cuda.shared("int32", 2)
    with cuda.when(t < 2):
        cuda.store(counts, T.int32(0), t)
    cuda.sync()
    memory = T.bind(T.cuda.cvta_generic_to_shared(counts.data))

    def take(which: int) -> Expr:
        place = cuda.local("uint32", 1)
        cuda.ptx("atom.shared.add.u32", place[0], memory + T.uint32(4 * which), T.uint32(1))
        return T.bind(T.reinterpret("int32", place[0]))

    with cuda.when(best >= bound):
        cuda.store(groups, t, take(0))
    cuda.sync()
    listed, warp, warps = T.bind(counts[0]), t // cuda.WARP, THREADS // cuda.WARP
    with T.serial(T.ceildiv(listed, warps)) as step:
        i = T.bind(step * warps + warp)
        with cuda.when(i < listed):
            for entry in entries_of(logits, vocab, m, T.bind(groups[i]), t % cuda.WARP):
                with cuda.when(cuda.both(entry >= bound, entry != T.int64(LAST))):
                    place = take(1)
                    with cuda.when(place < LISTED):
                        cuda.store(entries, entry, place)
    cuda.sync()
    return T.bind(counts[1])


def put_in_order(entries, listed: Expr, t: Expr) -> None:
    """The largest first."""
    with T.If(listed <= FEW):
        with T.Then():
            own, larger = count_larger(entries, t)
            cuda.sync()
            with cuda.when(cuda.both(t % SHARE == 0, own != T.int64(LAST))):
                cuda.store(entries, own, larger)
            cuda.sync()
        with T.Else():
            swap_into_order(entries, t, doublings_of(listed))


def draw(entries, sums, t, keep, temperature, top_p, uniform, scratch) -> Expr:
    """The token, of the sorted entries, of which `keep` are candidates."""
    largest = T.cast(logit_of(entries[0]), "float64")
    gap = T.cast(logit_of(entries[t]), "float64") - largest
    weight = T.if_then_else(gap == T.float64(0), T.float64(1), T.exp(gap / temperature))
    weight = T.bind(T.if_then_else(t < keep, weight, T.float64(0)))
    cuda.store(sums, scratch.running_sum(weight), t)
    cuda.sync()

    def first(holds: Expr) -> Expr:
        """The lowest thread for which it does, else the last candidate. Several may follow one for
        which it does not: sums of a tree fall by a rounding where the weights are tiny."""
        latest = scratch.reduce(T.bind(T.if_then_else(holds, THREADS - t, 0)), "max")
        return T.bind(T.if_then_else(latest > 0, THREADS - latest, keep - 1))

    enough = T.bind(top_p * sums[keep - 1])
    last = first(T.And(t < keep, sums[t] >= enough))
    drawn = T.bind(uniform * sums[last])
    chosen = first(T.And(t <= last, sums[t] > drawn))
    return token_of(entries[chosen])


def kernel(vocab: int, target: GpuTarget) -> PrimFunc:
    """(logits, temperature, top_k, top_p, uniform, out, best); `best` is between the launches."""
    rows = Var("M", "int64")

    def find_best(logits, best, b, m, warp, lane):
        group = T.bind(b * WARPS + warp)
        most = cuda.local("int64", 1)
        cuda.store(most, T.int64(LAST), 0)
        for entry in entries_of(logits, vocab, m, group, lane):
            cuda.store(most, T.max(most[0], entry), 0)
        of_group = largest_of(T.bind(most[0]))
        with cuda.when(lane == 0):
            cuda.store(best, of_group, m, group)

    def sample_row(logits, temperature, top_k, top_p, uniform, out, best, m, t):
        scratch, own = cuda.Scratch(t, THREADS), T.bind(best[m, t])
        entries, sums = cuda.shared("int64", LISTED), cuda.shared("float64", THREADS)
        bound = cuda.shared("int64", 1)
        largest = scratch.reduce_by(largest_of, own)
        keep = T.bind(T.min(top_k[m], vocab))
        is_greedy = T.bind(T.Or(temperature[m] == T.float32(0), keep == 1))
        finite = T.reinterpret("int32", T.abs(logit_of(largest))) < T.int32(INFINITE)
        with T.If(T.Or(is_greedy, T.Not(finite))):
            with T.Then(), cuda.when(t == 0):
                token = T.if_then_else(finite, token_of(largest), T.int64(NOT_FINITE))
                cuda.store(out, token, m)
            with T.Else():
                least = find_bound(entries, bound, own, keep, t)
                listed = list_candidates(entries, logits, vocab, m, own, least, t)
                put_in_order(entries, listed, t)
                candidates = T.bind(T.max(T.min(keep, THREADS), 1))
                heat = T.bind(T.max(T.cast(temperature[m], "float64"), cuda.float64(1e-300)))
                share = T.bind(T.cast(top_p[m], "float64"))
                u = T.bind(uniform[m])
                token = draw(entries, sums, t, candidates, heat, share, u, scratch)
                too_many = T.Or(T.Or(keep < 1, keep > THREADS), listed > LISTED)
                with cuda.when(t == 0):
                    cuda.store(out, T.if_then_else(too_many, T.int64(TOO_MANY), token), m)

    @T.prim_func(s_tir=True)
    def sample(
        logits: T.Buffer((rows, vocab), "float32"),
        temperature: T.Buffer((rows,), "float32"),
        top_k: T.Buffer((rows,), "int32"),
        top_p: T.Buffer((rows,), "float32"),
        uniform: T.Buffer((rows,), "float64"),
        out: T.Buffer((rows,), "int64"),
        best: T.Buffer((rows, GROUPS), "int64"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            T.reads()
            T.writes()
            with cuda.some_rows(rows):
                with cuda.blocks(GROUPS // WARPS) as b, cuda.blocks(rows, "y") as m:
                    with cuda.threads(WARPS, "y") as warp, cuda.threads(cuda.WARP) as lane:
                        find_best(logits, best, b, m, warp, lane)
                with cuda.blocks(rows) as m:
                    with cuda.threads(THREADS) as t:
                        sample_row(logits, temperature, top_k, top_p, uniform, out, best, m, t)

    return sample
