"""The sanitizers' runs, with a stand-in for compute-sanitizer: no GPU is needed."""

import ast
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_checks

SCHEDULES = Path(gpu_checks.__file__).parents[1] / "tests" / "schedules"
STAND_IN = """#!/bin/sh
[ "$1" = --tool ] && tool=$2
while [ "$1" != --log-file ]; do shift; done
echo "========= COMPUTE-SANITIZER" > "$2"
echo "2 passed, 1 skipped in 1s"
[ $tool = racecheck ] && {
  echo "========= Error: Race reported" >> "$2"
  echo "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)" >> "$2"
} || echo "========= ERROR SUMMARY: 0 errors" >> "$2"
exit ${CODE:-0}
"""


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def test_summaries_are_added(sanitizer, capsys):
    found = dict(gpu_checks.sanitize(("memcheck", "racecheck"), 2))
    files = len(gpu_checks.SANITIZED)
    assert found["memcheck"] == f"{files} files: 0 errors"
    assert (
        found["racecheck"]
        == f"{files} files: {2 * files} hazards, {files} errors, {files} warnings"
    )
    assert [gpu_checks.is_clean(summary) for summary in found.values()] == [True, False]
    complaints = capsys.readouterr().err
    assert complaints.count("Race reported") == files and "memcheck" not in complaints


def test_files_without_a_good_end_are_told_and_lose_no_other(sanitizer, monkeypatch, capsys):
    selected = gpu_checks.SANITIZED["glu_matmul"]
    files = {"glu_matmul": selected, "rope": "fails", "embedding": "hangs", "kv_append": "skips"}
    monkeypatch.setattr(gpu_checks, "SANITIZED", files)
    monkeypatch.setattr(gpu_checks, "MINUTES", 1 / 12)
    program = Path(gpu_checks.find_sanitizer())
    ends = 'case "$*" in *fails*) echo "1 failed"; exit 1;; *hangs*) echo test_x; sleep 60;; '
    ends += '*skips*) echo "3 skipped"; exit 0;; esac'
    program.write_text(program.read_text().replace("#!/bin/sh", f"#!/bin/sh\n{ends}"))
    ((_, found),) = gpu_checks.sanitize(("memcheck",), 1)
    assert found == "1 files: 0 errors; unfinished: rope embedding kv_append"
    assert not gpu_checks.is_clean(found)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "sanitize: memcheck of rope: 1 failed"
    assert told[1].startswith("sanitize: memcheck of embedding: no end within")
    assert told[1].endswith(" minutes: test_x")
    assert told[2] == "sanitize: memcheck of kv_append: 3 skipped"


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for_end(pid: int) -> None:
    end = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_alive(pid)


def test_what_a_command_started_ends_with_it(tmp_path):
    """A child that holds the pipe would keep the run from its end, and the GPU busy."""
    pid = tmp_path / "pid"
    child = f"sleep 600 & echo $! > {pid}; echo begun; sleep 600"
    assert gpu_checks.finish(["sh", "-c", child], 5) == (None, "begun\n")
    wait_for_end(int(pid.read_text()))
    assert gpu_checks.finish(["sh", "-c", "echo out; exit 3"], 60) == (3, "out\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_no_sanitizer_behind(sanitizer, tmp_path, number):
    program, pids = Path(gpu_checks.find_sanitizer()), tmp_path / "pids"
    program.write_text(f"#!/bin/sh\necho $$ >> {pids}\nexec sleep 600\n")
    check_interrupted("list(gpu_checks.sanitize(('memcheck',), 3))", pids, 3, number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_no_test_behind(tmp_path, number):
    python, pids = tmp_path / "python", tmp_path / "pids"
    python.write_text(f"#!/bin/sh\necho $$ >> {pids}\nexec sleep 600\n")
    python.chmod(0o755)
    run = f"gpu_checks.sys.executable = {str(python)!r}; gpu_checks.run_tests(2)"
    check_interrupted(run, pids, 1, number)


def check_interrupted(run: str, pids: Path, count: int, number: signal.Signals) -> None:
    """`run` starts `count` processes that write their numbers to `pids`, and gets a signal."""
    program = (
        "import signal; from benchmarks import gpu_checks;"
        # where tests run in the background, SIGINT is ignored by all that they start
        f"signal.signal(signal.SIGINT, signal.default_int_handler); {run}"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=SCHEDULES.parents[1]) as process:
        try:
            while not pids.exists() or len(pids.read_text().split()) < count:
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(number)
            assert process.wait(60) != 0
        finally:
            process.kill()
    started = [int(pid) for pid in pids.read_text().split()]
    for pid in started:
        wait_for_end(pid)
    assert len(started) == count


def test_no_sanitizer(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gpu_checks, "TOOLKIT", Path("/nowhere"))
    with pytest.raises(gpu_checks.CheckError, match="found no compute-sanitizer on the PATH or in"):
        gpu_checks.find_sanitizer()


@pytest.mark.parametrize(
    "last, code, refusal",
    [
        ("==== 3 passed, 2 skipped in 1s ====", 0, None),
        ("==== 10 passed in 1s ====", 0, None),
        ("10 passed, 1 warning in 1.5s (0:00:01)", 0, None),
        ("1 failed, 3 passed in 1s", 1, "tests: 1 failed, 3 passed in 1s"),
        ("==== 23 skipped in 1s ====", 0, "tests: none ran on this GPU: .*23 skipped"),
        ("==== no tests ran in 1s ====", 5, "tests: ==== no tests ran"),
        ("==== 1 failed, 3 passed in 1s ====", 1, "tests: ==== 1 failed, 3 passed"),
    ],
)
def test_a_run_in_which_nothing_passed(last, code, refusal, tmp_path, monkeypatch):
    python = tmp_path / "python"
    around = "echo '=== warnings summary ==='; echo '{}'; echo 'TVM: at exit' >&2"
    python.write_text(f"#!/bin/sh\n{around.format(last)}\nexit {code}\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu_checks.sys, "executable", str(python))
    if refusal is None:
        assert gpu_checks.run_tests(1) == f"{last}; {last}"
        return
    with pytest.raises(gpu_checks.CheckError, match=refusal):
        gpu_checks.run_tests(1)


def test_every_selection_selects():
    """A renamed test would leave its kernels unwatched."""
    for file, expression in gpu_checks.SANITIZED.items():
        tree = ast.parse((SCHEDULES / f"test_{file}.py").read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        for word in expression.split(" or "):
            if word.startswith("test_"):
                assert any(word in name for name in names), (file, word)


def test_every_op_on_a_gpu_is_watched():
    ops = {file.parent.name for file in SCHEDULES.parents[1].glob("schedules/*/cuda.py")}
    ops |= {file.parent.name for file in SCHEDULES.parents[1].glob("schedules/*/sm90.py")}
    assert ops and ops - {"intrin"} <= set(gpu_checks.SANITIZED)


def test_every_test_that_needs_a_gpu_is_run_on_one():
    """Those that skip without one: by their file and by their name."""
    tests = SCHEDULES.parent
    asking = []
    for file in tests.rglob("test_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", ())]
            if any("skipif(compute_capability() is None" in mark for mark in marks):
                asking.append((str(file.relative_to(tests.parent)), node.name))
    run = (*gpu_checks.TESTS, *gpu_checks.ALONE)
    assert asking and all(file.startswith(run) and "cuda" in name for file, name in asking)
