"""launch.c: parallel loops of a linked library, in processes of their own: a hang is a failure."""

import os
import subprocess
import sys
from functools import partial

import pytest
import tvm
from tvm.script import tirx as T
from tvm.support import cc

from compiler.pipeline import C_FLAGS, LAUNCH

ITEMS = 12

SETUP = """
import os, resource, sys, threading, time
import numpy as np
from runtime import tvm_runtime
os.environ["TVM_NUM_THREADS"] = "3"
module = tvm_runtime.load().load_module(sys.argv[1])
who_runs = module["who_runs"]

def run(work=0):
    "The thread of every item; each item adds one to so many numbers."
    out, scratch = np.zeros(12, np.uint64), np.zeros((12, max(work, 1)), np.int32)
    shared = [tvm_runtime.copy(array) for array in (out, scratch)]
    who_runs(*shared)
    out, scratch = map(tvm_runtime.view, shared)
    assert (scratch == 1).all()
    return out.tolist()

def run_by(count):
    "As `run`, until every worker has come in time to have its share."
    while len(set(threads := run(200000))) != count:
        pass
    return threads
"""

CASES = {
    "items are shared by threads, in order": """
threads = run_by(3)
assert threads[0] == threads[3] == threading.get_ident(), threads
assert threads[4] == threads[7] and threads[8] == threads[11], threads
assert run_by(3) == threads  # the same workers again
""",
    "the number of threads may change at every launch": """
for count in (2, 1, 3, 1, 2):  # of more workers than cores some may never come in time
    os.environ["TVM_NUM_THREADS"] = str(count)
    run_by(count)
    if count == 1:
        assert all(set(run(200000)) == {threading.get_ident()} for _ in range(20))
""",
    "the caller takes the shares of workers that have no core": """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
os.environ["TVM_NUM_THREADS"] = "6"
run()
waits = lambda: resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
before = waits()
for _ in range(300):
    run(10)
assert waits() - before < 100  # times that it gave its core up
""",
    "many launches, short and long": """
for work in [0, 1, 10, 1000, 100000] * 200:
    run(work)
""",
    "workers sleep when nothing runs": """
run()
time.sleep(0.05)
before = time.process_time()
time.sleep(0.5)
assert time.process_time() - before < 0.05
run_by(3)  # and wake up
""",
    "a forked child has its own workers": """
run()
child = os.fork()
if child == 0:
    os._exit(len(set(run_by(3))))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
run_by(3)
""",
    "two threads at once": """
def many():
    for _ in range(300):
        assert len(set(run(1000))) in (1, 2, 3)
callers = [threading.Thread(target=many) for _ in range(2)]
[c.start() for c in callers], [c.join() for c in callers]
""",
}


# Two launches of two shares, milliseconds: the worker ends the first within the caller's own 20
# and opens the gate 40 later, amid the second, of which it then takes its share of 100.
LATE = """
#include <stdio.h>
static int finished;
static int first(int task, Env *env, void *closure) {
  (void)env, (void)closure;
  if (!task) usleep(20000);
  return 0;
}
static int second(int task, Env *env, void *closure) {
  (void)env, (void)closure;
  usleep(task ? 100000 : 80000);
  if (task) finished = 1;
  return 0;
}
int main(void) {
  launch(first, 0, 2);
  launch(second, 0, 2);
  puts(finished ? "finished" : "a share was still running");
  return 0;
}
"""

# A worker that sleeps, last seen on the caller's CPU; the caller's share waits for the worker's.
SAME_CPU = """
#include <stdio.h>
static atomic_int worker_cpu;
static cpu_set_t mask;
static int share(int task, Env *env, void *closure) {
  (void)env, (void)closure;
  if (task) {
    pthread_getaffinity_np(pthread_self(), sizeof mask, &mask);
    atomic_store(&worker_cpu, sched_getcpu());
  }
  for (int i = 0; i < 1000 && atomic_load(&worker_cpu) < 0; ++i) usleep(1000);
  return 0;
}
int main(void) {
  cpu_set_t all, here;
  pthread_getaffinity_np(pthread_self(), sizeof all, &all);
  atomic_store(&worker_cpu, -1);
  launch(share, 0, 2); /* makes the worker */
  usleep(10000);
  int cpu = sched_getcpu();
  CPU_ZERO(&here);
  CPU_SET(cpu, &here);
  pthread_setaffinity_np(pthread_self(), sizeof here, &here);
  atomic_store(&worker_cpu, -1);
  atomic_store(&pool.workers[0].cpu, cpu);
  launch(share, 0, 2);
  printf("%d %d ", atomic_load(&worker_cpu) != cpu, CPU_EQUAL(&mask, &all));
  printf("%d ", pool.workers[0].moved > 0); /* the launch asked whether it may */
  pool.workers[0].moved = 0;                /* long ago */
  int first = may_move(&pool.workers[0]), again = may_move(&pool.workers[0]);
  printf("%d %d ", first, again);
  move_off(&pool.workers[0], cpu);
  pthread_getaffinity_np(pool.workers[0].thread, sizeof mask, &mask);
  printf("%d\\n", CPU_ISSET(cpu, &mask));
  return 0;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    @T.prim_func(s_tir=True)
    def who_runs(out: T.Buffer((ITEMS,), "uint64"), scratch_: T.handle):
        T.func_attr({"global_symbol": "who_runs"})
        work = T.int64()
        scratch = T.match_buffer(scratch_, (ITEMS, work), "int32")
        for i in T.parallel(ITEMS):
            out[i] = T.call_extern("uint64", "pthread_self")
            for j in T.serial(work):
                scratch[i, j] = scratch[i, j] + 1

    path = tmp_path_factory.mktemp("launch") / "who_runs.so"
    built = tvm.compile(tvm.IRModule({"who_runs": who_runs}), tvm.target.Target("llvm"))
    options = [*C_FLAGS, "-Wall", "-Wextra", "-Werror", str(LAUNCH)]
    built.export_library(str(path), fcompile=partial(cc.create_shared, cc="gcc", options=options))
    return path


@pytest.mark.parametrize("case", CASES)
def test_launch(library, case):
    command = [sys.executable, "-c", SETUP + CASES[case], library]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_gate_opened_late_ends_no_other_launch(tmp_path):
    """The worker loses its core between its share and the opening of the gate."""
    code, end = LAUNCH.read_text(), "== 1) open_gate(&pool.done)"
    assert code.count(end) == 1
    source, program = tmp_path / "late.c", tmp_path / "late"
    source.write_text(code.replace(end, "== 1) usleep(60000), open_gate(&pool.done)") + LATE)
    subprocess.run(["gcc", "-pthread", "-o", program, source], check=True)
    assert subprocess.run([program], capture_output=True, text=True).stdout == "finished\n"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU")
def test_a_worker_does_not_wake_on_the_callers_cpu(tmp_path):
    """Elsewhere for this once, then where the caller may; not again within a millisecond."""
    source, program = tmp_path / "same.c", tmp_path / "same"
    source.write_text(LAUNCH.read_text() + SAME_CPU)
    subprocess.run(["gcc", "-pthread", "-o", program, source], check=True)
    assert subprocess.run([program], capture_output=True, text=True).stdout == "1 1 1 1 0 0\n"


def test_tvm_does_not_find_the_pointer(library):
    """Its loader would put its own pool there."""
    names = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    assert "__tvm_ffi_who_runs" in names
    assert "__TVMBackendParallelLaunch" not in names
