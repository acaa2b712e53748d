"""workspace.c: what kernels take their buffers from, alone and in a linked library."""

import ctypes
import subprocess
from functools import partial

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T
from tvm.support import cc

from compiler.pipeline import C_FLAGS, LAUNCH, WORKSPACE, sources
from runtime import tvm_runtime
from schedules.targets import TARGETS

N = 4096

# Blocks of random sizes, given back in a random order; a thread that ends; the library's end.
CHURN = """
#include <assert.h>
#include <malloc.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCKS = 40, ROUNDS = 20000 };

static void *churn(void *seed_) {
  unsigned seed = *(unsigned *)seed_;
  unsigned char *blocks[BLOCKS] = {0}, marks[BLOCKS];
  size_t sizes[BLOCKS];
  for (int round = 0; round < ROUNDS; ++round) {
    int i = rand_r(&seed) % BLOCKS;
    if (blocks[i]) {
      for (size_t j = 0; j < sizes[i]; ++j) assert(blocks[i][j] == marks[i]);
      assert(!__TVMBackendFreeWorkspace(1, 0, blocks[i]));
      blocks[i] = NULL;
    } else {
      sizes[i] = rand_r(&seed) % (round % 100 ? 3000 : 300000);
      blocks[i] = __TVMBackendAllocWorkspace(1, 0, sizes[i], 2, 32);
      assert(blocks[i] && (uintptr_t)blocks[i] % 64 == 0);
      memset(blocks[i], marks[i] = rand_r(&seed), sizes[i]);
    }
  }
  for (int i = 0; i < BLOCKS; ++i)
    if (blocks[i]) __TVMBackendFreeWorkspace(1, 0, blocks[i]);
  assert(mine->top && !mine->top->last && !mine->top->before && !mine->top->used);
  return NULL;
}

int main(void) {
  unsigned seeds[] = {1, 2, 3};
  churn(seeds);
  Chunk *kept = mine->top;
  size_t taken = mallinfo2().uordblks + mallinfo2().hblkhd;
  for (int i = 1; i < 3; ++i) {
    pthread_t thread;
    assert(!pthread_create(&thread, NULL, churn, &seeds[i]));
    pthread_join(thread, NULL);
    assert(stacks == mine && !stacks->next); /* the thread's is gone */
  }
  assert(mallinfo2().uordblks + mallinfo2().hblkhd < taken + 8192); /* but for pthread's own */
  void *first = __TVMBackendAllocWorkspace(1, 0, 100, 2, 32);
  __TVMBackendFreeWorkspace(1, 0, first);
  assert(first == __TVMBackendAllocWorkspace(1, 0, 5000, 2, 32) && mine->top == kept);
  assert(!__TVMBackendAllocWorkspace(2, 0, 100, 2, 32)); /* of a GPU */
  assert(!__TVMBackendAllocWorkspace(1, 0, UINT64_MAX - 100, 2, 32));
  pthread_mutex_lock(&listed); /* as another thread may have while this one forks */
  if (!fork()) {
    alarm(60);
    mine = NULL;
    _exit(!__TVMBackendAllocWorkspace(1, 0, 100, 2, 32));
  }
  int status;
  assert(wait(&status) > 0 && status == 0);
  pthread_mutex_unlock(&listed);
  end_all();
  assert(!stacks);
  puts("finished");
  return 0;
}
"""


def test_blocks_of_any_order(tmp_path):
    source, program = tmp_path / "churn.c", tmp_path / "churn"
    source.write_text(WORKSPACE.read_text() + CHURN)
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", program, source], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "finished\n", done.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """out[i] = sum of x by way of a buffer of its own for each i"""

    @T.prim_func(s_tir=True)
    def sums(x: T.Buffer((N,), "int32"), out: T.Buffer((8,), "int32")):
        T.func_attr({"global_symbol": "sums", "tirx.is_scheduled": True})
        with T.sblock("root"):
            for i in T.parallel(8):
                doubled = T.alloc_buffer((N,), "int32")
                for j in T.serial(N):
                    doubled[j] = x[j] * 2 + i
                out[i] = 0
                for j in T.serial(N):
                    out[i] = out[i] + doubled[N - 1 - j]

    folder = tmp_path_factory.mktemp("workspace")
    path, told = folder / "sums.so", folder / "told.c"
    told.write_text(WORKSPACE.read_text() + "size_t room(void) { return mine->top->room; }\n")
    built = tvm.compile(tvm.IRModule({"sums": sums}), tvm.target.Target("llvm"))
    options = [*C_FLAGS, str(LAUNCH), str(told)]
    built.export_library(str(path), fcompile=partial(cc.create_shared, cc="gcc", options=options))
    return path


def test_kernels_take_their_buffers_from_it(library):
    x, out = np.arange(N, dtype=np.int32), np.zeros(8, np.int32)
    tensors = [tvm_runtime.copy(array) for array in (x, out)]
    kernel = tvm_runtime.load().load_module(str(library))["sums"]
    for _ in range(3):
        kernel(*tensors)
        wanted = 2 * x.sum() + N * np.arange(8)
        assert np.array_equal(tvm_runtime.view(tensors[1]), wanted)
    assert ctypes.CDLL(str(library)).room() >= 4 * N  # of this thread, which had its share


def test_tvm_does_not_find_the_pointers(library):
    """Its loader would put its own pool there."""
    names = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    assert "d __TVMBackendAllocWorkspace" in names and "d __TVMBackendFreeWorkspace" in names


def test_what_is_linked():
    assert sources(TARGETS["arm-neon"]) == [LAUNCH, WORKSPACE]
    assert sources(TARGETS["cuda-sm90"]) == [LAUNCH]
