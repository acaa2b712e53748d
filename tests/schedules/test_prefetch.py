"""What LLVM is told of a prefetch: the cache that it fills."""

import re

import pytest
import tvm
from tvm.script import tirx as T

from schedules.intrin.lanes import prefetch, prefetches_into_l2


def kernel():
    @T.prim_func(s_tir=True)
    def ask(w: T.Buffer((64,), "int8"), out: T.Buffer((1,), "int8")):
        prefetch(w, 0)
        out[0] = w[0]

    return ask


@pytest.mark.parametrize("factory, locality", [(kernel, 3), (prefetches_into_l2()(kernel), 2)])
def test_cache_that_a_prefetch_fills(factory, locality):
    mod = tvm.IRModule({"ask": factory().with_attr("global_symbol", "ask")})
    text = tvm.compile(mod, target=tvm.target.Target("llvm")).mod.inspect_source("ll")
    found = re.findall(r"call void @llvm\.prefetch\S*\(.*i32 0, i32 (\d), i32 1\)", text)
    assert found == [str(locality)]


def test_what_is_parsed_afterwards_fills_l1_again():
    prefetches_into_l2()(kernel)()
    with pytest.raises(RuntimeError), prefetches_into_l2():
        raise RuntimeError
    test_cache_that_a_prefetch_fills(kernel, 3)
