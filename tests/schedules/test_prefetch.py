"""What LLVM is told of a prefetch: the cache that it fills."""

import re

import pytest
import tvm
from tvm.script import tirx as T

from schedules.grouped_matmul import avx2 as head_avx2
from schedules.grouped_matmul import avx512vnni as head_avx512
from schedules.grouped_matmul import zen as head_zen
from schedules.grouped_matmul import zen4 as head_zen4
from schedules.intrin.lanes import ask_at, prefetch, prefetches_into_l2
from schedules.sparse_ternary_matmul import avx2 as sparse_avx2
from schedules.sparse_ternary_matmul import avx512vnni, zen4
from schedules.sparse_ternary_matmul import zen as sparse_zen
from schedules.sparse_ternary_matmul.avx512vnni import COLUMNS
from schedules.targets import TARGETS
from schedules.ternary_matmul import avx2, avx512vbmi
from schedules.ternary_matmul import zen as ternary_zen
from schedules.ternary_matmul import zen4 as ternary_zen4


def kernel():
    @T.prim_func(s_tir=True)
    def ask(w: T.Buffer((64,), "int8"), out: T.Buffer((1,), "int8")):
        prefetch(w, 0)
        out[0] = w[0]

    return ask


@pytest.mark.parametrize("factory, locality", [(kernel, 3), (prefetches_into_l2(1)(kernel), 2)])
def test_cache_that_a_prefetch_fills(factory, locality):
    mod = tvm.IRModule({"ask": factory().with_attr("global_symbol", "ask")})
    text = tvm.compile(mod, target=tvm.target.Target("llvm")).mod.inspect_source("ll")
    found = re.findall(r"call void @llvm\.prefetch\S*\(.*i32 0, i32 (\d), i32 1\)", text)
    assert found == [str(locality)]


def test_what_is_parsed_afterwards_fills_l1_again():
    prefetches_into_l2(1)(kernel)()
    with pytest.raises(RuntimeError), prefetches_into_l2(2):
        raise RuntimeError
    test_cache_that_a_prefetch_fills(kernel, 3)
    assert ask_at(640, 64) == [640]


def test_lines_are_asked_for_several_times_on_the_way():
    with prefetches_into_l2(4):
        assert ask_at(4096, 64) == [4096, 3072, 2048, 1024]
        assert ask_at(640, 64) == [640, 512, 320, 192]
        assert ask_at(7) == [7, 6, 4, 2] and ask_at(2) == [2, 1] and ask_at(0) == []


@pytest.mark.parametrize(
    "factory, arguments, locality",
    [
        (avx512vnni.kernel, (), 3),
        (zen4.kernel, (), 2),
        (avx512vbmi.kernel, (4, "scale"), 3),
        (ternary_zen4.kernel, (4, "scale"), 2),
        (ternary_zen4.kernel, (8, "scale"), 2),
        (ternary_zen4.kernel, (4, "glu"), 2),
        (sparse_zen.kernel, (), 2),
        (avx2.kernel, (4, "glu"), 3),
        (ternary_zen.kernel, (4, "glu"), 2),
        (ternary_zen.kernel, (4, "scale"), 2),
        (ternary_zen.kernel, (8, "scale"), 2),
    ],
)
def test_zen_fills_l2(factory, arguments, locality):
    bits, end = arguments[:1], arguments[1:]
    asked = prefetches(factory(256, 64, *bits, TARGETS["x86-zen4"], *end))
    assert asked and all(f", 0, {locality}, 1)" in line for line in asked)


def prefetches(kernel) -> list[str]:
    return [line for line in kernel.script().splitlines() if "llvm.prefetch" in line]


@pytest.mark.parametrize(
    "once, zen, bits, end",
    [
        (avx512vbmi, ternary_zen4, 4, "scale"),
        (avx512vbmi, ternary_zen4, 4, "glu"),
        (avx2, ternary_zen, 4, "scale"),
        (avx2, ternary_zen, 8, "scale"),
        (avx2, ternary_zen, 4, "glu"),
    ],
)
def test_zen_asks_four_times(once, zen, bits, end):
    arguments = 256, 2560, bits, TARGETS["x86-zen4"], end
    count = len(prefetches(once.kernel(*arguments, prefetch=4096)))
    assert len(prefetches(zen.kernel(*arguments))) == 4 * count > 0


@pytest.mark.parametrize(
    "once, zen, streams", [(head_avx512, head_zen4, 4), (head_avx2, head_zen, 2)]
)
def test_zen_asks_four_times_for_the_head(once, zen, streams):
    arguments = 256, 2560, 6, TARGETS["x86-zen4"]
    count = len(prefetches(once.kernel(*arguments, streams=streams, prefetch=4096)))
    assert len(prefetches(zen.kernel(*arguments))) == 4 * count > 0


@pytest.mark.parametrize(
    "once, zen, ahead, times", [(avx512vnni, zen4, 4, 4), (sparse_avx2, sparse_zen, 2, 2)]
)
def test_zen_asks_for_a_group_of_columns_on_the_way(once, zen, ahead, times):
    arguments = 256, 2560, TARGETS["x86-zen4"]
    never, first = (len(prefetches(once.kernel(*arguments, ahead=at))) for at in (0, ahead))
    walks = (first - never) // COLUMNS  # that are in the kernel; each has its group of columns
    assert len(prefetches(zen.kernel(*arguments))) == first + (times - 1) * walks * COLUMNS


def test_zen4_halves_the_streams_of_two_tables():
    def calls(streams, bits, end="scale"):
        arguments = 256, 2560, bits, TARGETS["x86-zen4"], end
        return len(prefetches(ternary_zen4.kernel(*arguments, streams=streams)))

    assert calls(4, 8) == calls(2, 4) and calls(1, 8) == calls(1, 4)
    assert calls(4, 8, "glu") == calls(4, 4, "glu")
