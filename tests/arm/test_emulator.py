"""The emulator notices what a kernel does wrong: a test that passes under it has not by luck."""

import os

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from schedules.intrin import threads
from schedules.targets import TARGETS
from tests.arm import emulator
from tests.schedules.compiled import compiled, is_emulated

ROW = TARGETS["arm-neon"]
pytestmark = pytest.mark.skipif(
    bool(emulator.missing()) or not is_emulated(ROW),
    reason=str(emulator.missing() or "an aarch64 host runs its kernels itself"),
)


def kernel(body):
    """kernel(x i32[16], n i32[1]), of which body emits the statements."""

    @T.prim_func(s_tir=True)
    def func(x: T.Buffer((16,), "int32"), n: T.Buffer((1,), "int32")):
        with T.sblock("root"):
            body(x, n)

    return func


def run(body, n: int) -> np.ndarray:
    return compiled(kernel(body), ROW)(np.arange(16, dtype=np.int32), np.array([n], np.int32))[0]


def add_one(x, n) -> None:
    with T.serial(n[0]) as i:
        T.buffer_store(x, x[i] + 1, [i])


def test_calls_a_kernel():
    np.testing.assert_array_equal(run(add_one, 16), np.arange(1, 17))


@pytest.mark.parametrize("n", [17, 2000])
def test_writing_past_an_array_ends_the_call(n):
    """x fills its 64 bytes; what follows is not there."""
    with pytest.raises(RuntimeError, match=r"exit status"):
        run(add_one, n)
    np.testing.assert_array_equal(run(add_one, 0), np.arange(16))  # the next one is well


def test_reading_past_an_array_ends_the_call():
    def total(x, n):
        T.buffer_store(x, x[n[0]], [0])

    with pytest.raises(RuntimeError, match=r"exit status"):
        run(total, 16)


def test_scratch_holds_poison():
    def copy(x, n):
        scratch = T.alloc_buffer((4096,), "int32")
        T.buffer_store(scratch, T.int32(0), [n[0]])
        with T.serial(16) as i:
            T.buffer_store(x, scratch[x[i] * 64 + 1], [i])  # an index that nobody foresees

    assert (run(copy, 0).view(np.uint8) == 0xA5).all()


def test_parallel_loop_is_done_whole():
    def number(x, n):
        with T.parallel(n[0]) as i:
            T.buffer_store(x, i + threads.count(), [i])

    found = run(number, 16)
    np.testing.assert_array_equal(found, np.arange(16) + int(os.environ["TVM_NUM_THREADS"]))


def test_instruction_that_the_cpu_lacks_ends_the_call():
    def dot(x, n):
        lanes = [T.reinterpret("int8x16", x[T.ramp(4 * i, 1, 4)]) for i in range(2)]
        zero = T.broadcast(T.int32(0), 4)
        found = T.call_llvm_pure_intrin("int32x4", "llvm.aarch64.neon.sdot", zero, *lanes)
        T.buffer_store(x, found, [T.ramp(0, 1, 4)])

    arrays = np.arange(16, dtype=np.int32), np.zeros(1, np.int32)
    dotprod = TARGETS["arm-dotprod"]
    assert compiled(kernel(dot), dotprod)(*arrays)[0][0] == 0
    built = tvm.compile(
        tvm.IRModule({"kernel": kernel(dot).with_attr("global_symbol", "kernel")}),
        target=dotprod.to_tvm(),
    )
    with pytest.raises(RuntimeError, match=r"cortex-a72: exit status"):
        emulator.EmulatedKernel(built, ROW)(*arrays)


def test_refused_arguments_say_why():
    with pytest.raises(RuntimeError, match=r"Error"):
        compiled(kernel(add_one), ROW)(np.zeros(3, np.int32), np.zeros(1, np.int32))
