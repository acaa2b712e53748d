"""nvcc: a kernel becomes a fat binary for every arch here, and comes out of the library as such."""

import shutil

import pytest
import tvm
import tvm_ffi
from tvm.script import tirx as T

from compiler.config import BuildError
from compiler.nvcc import compile_fat, compiling_for, find_nvcc, gencode, require
from runtime import device_code, tvm_runtime
from schedules.targets import TARGETS

SOURCE = 'extern "C" __global__ void twice(float* x) { x[threadIdx.x] *= 2; }'
FATBIN = b"\x50\xed\x55\xba"  # the magic number of a fat binary, 0xba55ed50
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")


def test_gencode():
    assert gencode(["sm_90a"]) == ["-gencode", "arch=compute_90a,code=sm_90a"]
    assert gencode(["sm_80", "sm_90"])[-1] == "arch=compute_90,code=compute_90"


@needs_nvcc
def test_compile_fat():
    archs = TARGETS["cuda-fat"].archs
    binary = compile_fat(SOURCE, archs, find_nvcc(TARGETS["cuda-fat"]))
    assert binary.startswith(FATBIN)


@needs_nvcc
def test_what_nvcc_refuses_is_shown():
    with pytest.raises(RuntimeError, match="undefined"):
        compile_fat("__global__ void f() { nothing(); }", ["sm_90"], "nvcc")


def test_no_nvcc(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BuildError, match="cuda-sm90 needs it to compile for sm_90a, found none"):
        find_nvcc(TARGETS["cuda-sm90"])


def test_nvcc_too_old_for_the_target(monkeypatch, tmp_path):
    script = tmp_path / "nvcc"
    script.write_text(
        "#!/bin/sh\necho \"nvcc fatal   : Unsupported gpu architecture 'x'\" >&2; exit 1"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(
        BuildError,
        match=r"nvcc: cuda-sm100 asks for sm_100; .*/nvcc says: nvcc fatal   : Unsupported gpu "
        r"architecture 'x'; possible: CUDA 13\.0 or later",
    ):
        require(TARGETS["cuda-sm100"])


@needs_nvcc
def test_nvcc_that_can():
    require(TARGETS["cuda-sm90"])


@needs_nvcc
def test_library_holds_the_binary(tmp_path):
    """What the runtime decodes is what nvcc wrote, and no source goes along."""

    @T.prim_func(s_tir=True)
    def twice(x: T.Buffer((32,), "float32")):
        T.func_attr({"tirx.is_scheduled": True})
        for t in T.thread_binding(32, thread="threadIdx.x"):
            x[t] = x[t] * T.float32(2)

    spec = TARGETS["cuda-sm80"]
    with compiling_for(spec, find_nvcc(spec)):
        built = tvm.compile(tvm.IRModule({"twice": twice}), target=spec.to_tvm())
    library = tmp_path / "twice.so"
    built.export_library(str(library))
    data = library.read_bytes()
    start = data.index(device_code.PREFIX.encode())
    text = data[start : data.index(b"\n", start)].decode("ascii")
    assert b"__global__" not in data

    tvm_runtime.load()
    decoded = tvm_ffi.get_global_func(device_code.CALLBACK)(text)
    assert bytes(decoded).startswith(FATBIN)
