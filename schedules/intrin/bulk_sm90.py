"""Bulk copies into shared memory on Hopper: one thread asks, a barrier there counts the bytes.

make(barrier, count=1)                           one thread, once
expect(barrier, size); copy(...), copy(...)      size is of all the copies of a phase
wait(barrier, phase % 2)                         every thread that reads what came
arrive(barrier)                                  without bytes; `count` calls end a phase
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.intrin import cuda

BARRIER_BYTES = 8


def make(barrier: Expr, count: int = 1) -> None:
    """For as many calls of `expect` or `arrive` a phase."""
    cuda.ptx("mbarrier.init.shared.b64", barrier, T.uint32(count))
    cuda.ptx("fence.proxy.async.shared::cta")


def expect(barrier: Expr, size: Expr | int) -> None:
    """The barrier's phase ends when `size` bytes have come."""
    cuda.ptx("mbarrier.arrive.expect_tx.shared.b64", barrier, T.cast(size, "uint32"))


def arrive(barrier: Expr) -> None:
    cuda.ptx("mbarrier.arrive.shared.b64", barrier)


def copy(destination: Expr, source: Expr, size: Expr | int, barrier: Expr) -> None:
    """`size` bytes, a multiple of 16, to an address of shared memory."""
    instruction = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    cuda.ptx(instruction, destination, source, T.cast(size, "uint32"), barrier)


def copy_to_all(
    destination: Expr, source: Expr, size: Expr | int, barrier: Expr, blocks: Expr
) -> None:
    """The same to the same place of each block of a cluster whose bit is set in `blocks`, and to
    the barrier there: read from memory once."""
    instruction = (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
    )
    size, mask = T.cast(size, "uint32"), T.cast(blocks, "uint16")
    cuda.ptx(instruction, destination, source, size, barrier, mask)


def wait(barrier: Expr, parity: Expr | int = 0) -> None:
    """For the end of the phase of this parity."""
    done = cuda.local("uint32", 1)
    cuda.store(done, T.uint32(0), 0)
    parity = T.uint32(parity) if isinstance(parity, int) else cuda.offset(parity)
    with T.While(done[0] == T.uint32(0)):
        cuda.ptx("mbarrier.try_wait.parity.shared.b64", done[0], barrier, parity)
