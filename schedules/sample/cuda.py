"""sample on CUDA: a block a row; what runtime/sampler.py does, without the logits leaving the GPU.

    for m in M:                                         blockIdx.x
        best[t] = largest logit of t, t + 1024, ...     threadIdx.x; one read of the row
        if temperature is 0 or top_k is 1: the largest of them, and no more
        bound = the top_k-th largest of best            as many logits reach it, or more
                or of 128 groups of 8, up to top_k 128: 28 steps of sorting for 55
        list of (logit, id) that reach bound            two more reads, from L2: count, then write
        sort, the largest first, ties to the lower id   bitonic, in shared memory, as many as listed
        p[i] = exp((logit[i] - max) / temperature)      float64, i < top_k
        sums = running sums of p
        size = the first i with sums[i] >= top_p * sums[top_k - 1], that one included
        token = the id of the first i with sums[i] > uniform * sums[size - 1]

    tile    | value | bound by
    THREADS | 1024  | top_k at most: the bound is one of the threads' best
    BATCH   | 16    | loads in flight: one at a time, a read of 128256 logits waits 126 times
    LISTED  | 2048  | 16 KB to sort; logits that tie with the bound can be more

A result below 0 is no token: NOT_FINITE if the largest logit is no number, TOO_MANY if the row is
the host's to sample (top_k of 0 or above 1024, or more logits than LISTED reach the bound).
Logits order as integers of the same bits, once negative ones have theirs flipped; what is no number
comes first, whatever its sign.
"""

from collections.abc import Callable
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc, Var

from schedules.intrin import cuda
from schedules.targets import GpuTarget

THREADS = 1024
BATCH = 16
LISTED = 2048
NOT_FINITE, TOO_MANY = -1, -2
LOW_32 = 0xFFFFFFFF
INFINITE = 0x7F800000  # the bits of a float32; what lies above is no number
NOT_A_NUMBER = 0x7FC00000
LAST = -(1 << 63)  # sorts behind every entry
GROUP = 8  # neighbouring threads whose best is one, where THREADS / GROUP are enough


def entry_of(logit: Expr, token: Expr) -> Expr:
    """int64 that rises with the logit, then falls with the token."""
    bits = T.reinterpret("int32", T.if_then_else(logit == T.float32(0), T.float32(0), logit))
    is_number = (bits & T.int32(0x7FFFFFFF)) <= T.int32(INFINITE)
    bits = T.bind(T.if_then_else(is_number, bits, T.int32(NOT_A_NUMBER)))
    order = T.bind(bits ^ (T.shift_right(bits, 31) & T.int32(0x7FFFFFFF)))
    high = T.shift_left(T.cast(order, "int64"), T.int64(32))
    return T.bind(high | (T.int64(LOW_32) - T.cast(token, "int64")))


def each_entry(logits, vocab: int, m, t, body: Callable[[Expr], None]) -> None:
    """body(entry) of the thread's logits t, t + THREADS, ...; LAST past the vocabulary."""
    batch = cuda.local("float32", BATCH)
    with T.serial(-(-vocab // (THREADS * BATCH))) as step:
        tokens = [T.bind((step * BATCH + i) * THREADS + t) for i in range(BATCH)]
        for i, token in enumerate(tokens):
            cuda.store(batch, logits[m, T.min(token, vocab - 1)], i)
        for i, token in enumerate(tokens):
            body(T.bind(T.if_then_else(token < vocab, entry_of(batch[i], token), T.int64(LAST))))


def logit_of(entry: Expr) -> Expr:
    order = T.bind(T.cast(T.shift_right(entry, T.int64(32)), "int32"))
    return T.reinterpret("float32", order ^ (T.shift_right(order, 31) & T.int32(0x7FFFFFFF)))


def token_of(entry: Expr) -> Expr:
    return T.int64(LOW_32) - (entry & T.int64(LOW_32))


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


def find_bound(entries, best: Expr, keep: Expr, t: Expr) -> Expr:
    """The keep-th largest of the threads' best, or of the groups' where there are enough."""
    few = T.bind(keep <= THREADS // GROUP)
    of_group = cuda.local("int64", 1)
    cuda.store(of_group, best, 0)
    for lanes in (1, 2, 4):
        other = T.bind(cuda.shuffle_xor(of_group[0], lanes))
        cuda.store(of_group, T.max(of_group[0], other), 0)
    for half in range(LISTED // THREADS):
        cuda.store(entries, T.int64(LAST), half * THREADS + t)
    cuda.sync()
    with T.If(few):
        with T.Then(), cuda.when(t % GROUP == 0):
            cuda.store(entries, of_group[0], t // GROUP)
        with T.Else():
            cuda.store(entries, best, t)
    count = T.Select(few, THREADS // GROUP, THREADS)
    swap_into_order(entries, t, doublings_of(T.bind(count)))
    bound = T.bind(entries[T.max(T.min(keep, THREADS) - 1, 0)])
    cuda.sync()
    return bound


def running_sum(sums, value: Expr, t: Expr) -> None:
    """sums[t] = value of threads 0 to t."""
    cuda.store(sums, value, t)
    step = 1
    while step < THREADS:
        cuda.sync()
        earlier = T.bind(T.if_then_else(t >= step, sums[T.max(t - step, 0)], T.float64(0)))
        cuda.sync()
        cuda.store(sums, sums[t] + earlier, t)
        step *= 2
    cuda.sync()


def list_candidates(entries, logits, vocab: int, m, t, bound: Expr, scratch) -> Expr:
    """entries = those from the bound on, LAST behind them; how many there are, LISTED or not"""
    for half in range(LISTED // THREADS):
        cuda.store(entries, T.int64(LAST), half * THREADS + t)
    mine = cuda.local("int32", 1)
    cuda.store(mine, T.int32(0), 0)

    def count(entry: Expr) -> None:
        cuda.store(mine, mine[0] + T.cast(entry >= bound, "int32"), 0)

    each_entry(logits, vocab, m, t, count)
    before, total = scratch.scan(T.bind(mine[0]))
    at, listed = cuda.local("int32", 1), T.bind(total)
    cuda.store(at, before, 0)

    def write(entry: Expr) -> None:
        with cuda.when(entry >= bound):
            with cuda.when(at[0] < LISTED):
                cuda.store(entries, entry, at[0])
            cuda.store(at, at[0] + 1, 0)

    each_entry(logits, vocab, m, t, write)
    return listed


def draw(out, entries, sums, m, t, keep, temperature, top_p, uniform, scratch) -> None:
    """out[m] from the sorted entries, of which `keep` are candidates"""
    largest = T.cast(logit_of(entries[0]), "float64")
    gap = T.cast(logit_of(entries[t]), "float64") - largest
    weight = T.if_then_else(gap == T.float64(0), T.float64(1), T.exp(gap / temperature))
    running_sum(sums, T.bind(T.if_then_else(t < keep, weight, T.float64(0))), t)

    def first(holds: Expr) -> Expr:
        """The lowest thread for which it does, else the last candidate. Several may follow one for
        which it does not: sums of a tree fall by a rounding where the weights are tiny."""
        latest = scratch.reduce(T.bind(T.if_then_else(holds, THREADS - t, 0)), "max")
        return T.bind(T.if_then_else(latest > 0, THREADS - latest, keep - 1))

    enough = T.bind(top_p * sums[keep - 1])
    last = first(T.And(t < keep, sums[t] >= enough))
    drawn = T.bind(uniform * sums[last])
    chosen = first(T.And(t <= last, sums[t] > drawn))
    with cuda.when(t == 0):
        cuda.store(out, token_of(entries[chosen]), m)


def kernel(vocab: int, target: GpuTarget) -> PrimFunc:
    """(logits, temperature, top_k, top_p, uniform, out)"""
    rows = Var("M", "int64")

    def sample_row(logits, temperature, top_k, top_p, uniform, out, m, t):
        scratch = cuda.Scratch(t, THREADS)
        best = cuda.local("int64", 1)
        cuda.store(best, T.int64(LAST), 0)
        each_entry(logits, vocab, m, t, lambda e: cuda.store(best, T.max(best[0], e), 0))
        largest = T.bind(scratch.reduce(best[0], "max"))
        entries = cuda.shared("int64", LISTED)
        sums = cuda.shared("float64", THREADS)
        keep = T.bind(T.min(top_k[m], vocab))
        is_greedy = T.bind(T.Or(temperature[m] == T.float32(0), keep == 1))
        finite = T.reinterpret("int32", T.abs(logit_of(largest))) < T.int32(INFINITE)
        with T.If(T.Or(is_greedy, T.Not(finite))):
            with T.Then(), cuda.when(t == 0):
                token = T.if_then_else(finite, token_of(largest), T.int64(NOT_FINITE))
                cuda.store(out, token, m)
            with T.Else():
                bound = find_bound(entries, T.bind(best[0]), keep, t)
                listed = list_candidates(entries, logits, vocab, m, t, bound, scratch)
                swap_into_order(entries, t, doublings_of(listed))
                candidates = T.bind(T.max(T.min(keep, THREADS), 1))
                heat = T.bind(T.max(T.cast(temperature[m], "float64"), cuda.float64(1e-300)))
                share = T.bind(T.cast(top_p[m], "float64"))
                u = T.bind(uniform[m])
                draw(out, entries, sums, m, t, candidates, heat, share, u, scratch)
                too_many = T.Or(T.Or(keep < 1, keep > THREADS), listed > LISTED)
                with cuda.when(cuda.both(t == 0, too_many)):
                    cuda.store(out, T.int64(TOO_MANY), m)

    @T.prim_func(s_tir=True)
    def sample(
        logits: T.Buffer((rows, vocab), "float32"),
        temperature: T.Buffer((rows,), "float32"),
        top_k: T.Buffer((rows,), "int32"),
        top_p: T.Buffer((rows,), "float32"),
        uniform: T.Buffer((rows,), "float64"),
        out: T.Buffer((rows,), "int64"),
    ):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        with T.sblock("root"):
            with cuda.some_rows(rows):
                with cuda.blocks(rows) as m:
                    with cuda.threads(THREADS) as t:
                        sample_row(logits, temperature, top_k, top_p, uniform, out, m, t)

    return sample
