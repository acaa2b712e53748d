"""The sanitizers' runs, with a stand-in for compute-sanitizer: no GPU is needed."""

import ast
from pathlib import Path

import pytest

from benchmarks import gpu_checks

SCHEDULES = Path(gpu_checks.__file__).parents[1] / "tests" / "schedules"
STAND_IN = """#!/bin/sh
[ "$1" = --tool ] && tool=$2
while [ "$1" != --log-file ]; do shift; done
echo "========= COMPUTE-SANITIZER" > "$2"
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
    found = gpu_checks.sanitize(("memcheck", "racecheck"), 2)
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
    files = {"glu_matmul": selected, "rope": "fails", "embedding": "hangs"}
    monkeypatch.setattr(gpu_checks, "SANITIZED", files)
    monkeypatch.setattr(gpu_checks, "MINUTES", 1 / 60)
    program = Path(gpu_checks.find_sanitizer())
    ends = 'case "$*" in *fails*) echo "1 failed"; exit 1;; *hangs*) sleep 60;; esac'
    program.write_text(program.read_text().replace("#!/bin/sh", f"#!/bin/sh\n{ends}"))
    found = gpu_checks.sanitize(("memcheck",), 1)["memcheck"]
    assert found == "1 files: 0 errors; unfinished: rope embedding"
    assert not gpu_checks.is_clean(found)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "sanitize: memcheck of rope: 1 failed"
    assert told[1].startswith("sanitize: memcheck of embedding: no end within")


def test_what_a_command_started_ends_with_it():
    """A child that holds the pipe would keep the run from its end, and the GPU busy."""
    code, _ = gpu_checks.finish(["sh", "-c", "sleep 600 & sleep 600"], 0.2)
    assert code is None
    assert gpu_checks.finish(["sh", "-c", "echo out; exit 3"], 60) == (3, "out\n")


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
        ("==== 23 skipped in 1s ====", 0, "tests: none ran on this GPU: .*23 skipped"),
        ("==== no tests ran in 1s ====", 5, "tests: ==== no tests ran"),
        ("==== 1 failed, 3 passed in 1s ====", 1, "tests: ==== 1 failed, 3 passed"),
    ],
)
def test_a_run_in_which_nothing_passed(last, code, refusal, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{last}'\nexit {code}\n")
    python.chmod(0o755)
    monkeypatch.setattr(gpu_checks.sys, "executable", str(python))
    if refusal is None:
        assert gpu_checks.run_tests(1) == last
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
