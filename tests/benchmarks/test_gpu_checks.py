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


def test_tests_that_fail_are_told(sanitizer, monkeypatch):
    monkeypatch.setenv("CODE", "1")
    with pytest.raises(gpu_checks.CheckError, match="sanitize: memcheck of "):
        gpu_checks.sanitize(("memcheck",), 1)


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
