"""AMX-INT8 used from TVMScript: eight tiles, t0 to t7, of 16 rows of 64 bytes.

LLVM has two forms of each tile instruction; these name their tile by a constant and need no
register of LLVM's tile type, which TVM has no word for.
https://www.intel.com/content/www/us/en/docs/intrinsics-guide
"""

from tvm.ir import Expr
from tvm.script import tirx as T

ROWS, ROW_BYTES = 16, 64
TILES = 8
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18


def request() -> None:
    """Ask Linux for the tile registers, once a process; again is harmless and takes 0.1 us.
    https://docs.kernel.org/arch/x86/xstate.html"""
    numbers = [T.int64(i) for i in (ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA)]
    T.evaluate(T.call_extern("int64", "syscall", *numbers))


def configure(palette) -> None:
    """All tiles of full size, for this thread until `release`; palette is scratch, u8[64]."""
    with T.serial(64) as i:
        T.buffer_store(palette, T.uint8(0), [i])
    T.buffer_store(palette, T.uint8(1), [0])
    with T.serial(TILES) as t:
        T.buffer_store(palette, T.uint8(ROW_BYTES), [16 + 2 * t])
        T.buffer_store(palette, T.uint8(ROWS), [48 + t])
    _call("ldtilecfg", T.address_of(palette[0]))


def release() -> None:
    _call("tilerelease")


def clear(tile: int) -> None:
    _call("tilezero", T.int8(tile))


def load(tile: int, buffer, *index: Expr | int, row_bytes: int) -> None:
    """Row r from r * row_bytes behind the index."""
    _call("tileloadd64", T.int8(tile), T.address_of(buffer[index]), T.int64(row_bytes))


def store(tile: int, buffer, *index: Expr | int, row_bytes: int) -> None:
    _call("tilestored64", T.int8(tile), T.address_of(buffer[index]), T.int64(row_bytes))


def dot_bytes(sums: int, signed: int, unsigned: int) -> None:
    """tdpbsud: int32 sums[m, n] += sum over q < 16, i < 4 of signed[m, 4q+i] * unsigned[q, 4n+i]"""
    _call("tdpbsud", T.int8(sums), T.int8(signed), T.int8(unsigned))


def _call(name: str, *args: Expr) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))
