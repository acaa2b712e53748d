"""What a run on a GPU keeps when a part of it fails: no GPU is needed."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from benchmarks import gpu
from schedules.targets import TARGETS


def test_cases_that_fail_are_named_and_lose_no_other(monkeypatch, capsys):
    def build(case):
        if case.name == "unbuilt":
            raise RuntimeError("nvcc: no")
        return case

    def run(bench, case, kernel):
        assert kernel.name != "wrong", "1 of 9 elements"
        return {"name": case.name}

    names = ("first", "unbuilt", "wrong", "last")
    cases = [SimpleNamespace(group="gemv", name=name) for name in names]
    monkeypatch.setattr(gpu, "cases", lambda _: iter(cases))
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.nvcc, "compiling_for", lambda *_: nullcontext())
    bench = SimpleNamespace(target=TARGETS["cuda-sm90"], compiler="nvcc", build=build)
    rows, failed = gpu.measure(bench, ("gemv",), None)
    assert ([row["name"] for row in rows], failed) == (
        ["first", "last"],
        ["gemv unbuilt", "gemv wrong"],
    )
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "RuntimeError gemv unbuilt: nvcc: no"
    assert told[1].startswith("WRONG gemv wrong: 1 of 9 elements")


def test_a_step_is_kept_where_prompts_fail(monkeypatch):
    def fail(*_):
        raise RuntimeError("no peer")

    monkeypatch.setattr(gpu.gpu_step, "measure", lambda engine, context: {"context": context})
    monkeypatch.setattr(gpu.gpu_prefill, "compare", fail)
    manifest = {"library": {"sha256": "4f"}}
    artifact = SimpleNamespace(model="tiny", context_length=100, manifest=manifest)
    found: dict = {}
    parts = gpu.measure_model(SimpleNamespace(artifact=artifact, kv_bits=3), found)
    assert list(parts) == ["prefill", None]
    assert found == {
        "model": "tiny",
        "kv_bits": 3,
        "library_sha256": "4f",
        "step": {"context": 52},
    }


OF = {"commit": "e176c79483b5", "device": "H100", "target": "cuda-sm90"}


@pytest.mark.parametrize(
    "kept, refusal",
    [
        (OF | {"commit": "0000000"}, "it is of 0000000, H100, cuda-sm90, here is e176c79483b5, H1"),
        (OF | {"device": "A100"}, "it is of e176c79483b5, A100, cuda-sm90, here is"),
        (OF | {"target": None}, "it is of e176c79483b5, H100, None, here is"),
        ({}, "found no file that benchmarks.gpu wrote"),
        ([], "found no file that benchmarks.gpu wrote"),
    ],
)
def test_a_file_of_the_same_kernels_is_added_to(tmp_path, kept, refusal):
    file = tmp_path / "gpu.json"
    assert gpu.earlier(file, OF) == gpu.earlier(None, OF) == {}
    file.write_text(json.dumps(OF | {"tests": "1 passed"}))
    assert gpu.earlier(file, OF) == OF | {"tests": "1 passed"}
    file.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=refusal):
        gpu.earlier(file, OF)


@pytest.mark.parametrize("commit", ["e176c79483b5-dirty", "unknown"])
def test_a_file_of_unknown_kernels_is_not(tmp_path, commit):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(OF | {"commit": commit}))
    with pytest.raises(ValueError, match=f"it is of {commit}, which may"):
        gpu.earlier(file, OF | {"commit": commit})


def row(group, us=1):
    return {"group": group, "name": "x", "us": us}


def test_what_is_measured_anew_is_dropped():
    kept = {
        "tests": "9 passed",
        "step": {},
        "prefill": [],
        "failed": ["gemv y", "gemm y", "step"],
        "rows": [row("gemv"), row("gemm")],
    }
    assert gpu.without(kept, ("gemv", "step", "prefill")) == {
        "tests": "9 passed",
        "failed": ["gemm y"],
        "rows": [row("gemm")],
    }
    assert gpu.without({}, ()) == {"failed": [], "rows": []}


@pytest.fixture
def a_gpu(monkeypatch):
    """One that measures as it is told to."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(gpu.nvcc, "find_nvcc", lambda _: "nvcc")
    monkeypatch.setattr(gpu.device_code, "install", lambda: None)
    monkeypatch.setattr(gpu.Bench, "read_bandwidth", 3e12)
    monkeypatch.setattr(gpu.gpu_checks, "find_sanitizer", lambda: "")
    monkeypatch.setattr(gpu.gpu_checks, "run_tests", lambda _: "9 passed")
    clean = {"memcheck": "2 files: 0 errors", "racecheck": "2 files: 1 hazard"}
    monkeypatch.setattr(
        gpu.gpu_checks, "sanitize", lambda tools, _: ((tool, clean[tool]) for tool in tools)
    )
    monkeypatch.setattr(gpu, "versions", lambda: {"torch": "2", "cuda": "13", "driver": "580"})
    monkeypatch.setattr(
        gpu, "measure", lambda bench, groups, _: ([row(g) for g in groups], ["gemv y"])
    )


def test_parts_are_added_to_one_file(a_gpu, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    common = ["--target", "cuda-sm90", "--commit", OF["commit"], "--output", str(file)]
    assert gpu.main(["--check", "--sanitize", "memcheck", "--only", *common]) == 0
    first = json.loads(file.read_text())
    assert first == OF | {
        "failed": [],
        "rows": [],
        "tests": "9 passed",
        "sanitizers": {"memcheck": "2 files: 0 errors"},
    }
    assert gpu.main(["--only", "gemv", "head", *common]) == 1
    assert gpu.main(["--sanitize", "racecheck", "--only", *common]) == 1
    found = json.loads(file.read_text())
    assert found["rows"] == [row("gemv"), row("head")] and found["failed"] == ["gemv y"]
    assert found["sanitizers"] == first["sanitizers"] | {"racecheck": "2 files: 1 hazard"}
    assert (found["tests"], found["read_gb_per_s"]) == ("9 passed", 3000)
    assert [found[name] for name in ("torch", "cuda", "driver")] == ["2", "13", "580"]
    # what failed in another command is no failure of this one
    assert gpu.main(["--check", "--only", *common]) == 0

    before = file.read_text()
    common[3] = "0000000"
    with pytest.raises(SystemExit) as exit:
        gpu.main(["--check", "--only", *common])
    assert exit.value.code == 2 and file.read_text() == before
    told = capsys.readouterr().err
    assert "it is of e176c79483b5, H100, cuda-sm90, here is 0000000, H100, cuda-sm90; poss" in told
    assert gpu.main(common) == 1  # all groups: a new file
    assert "tests" not in json.loads(file.read_text())


def test_results_are_kept_as_they_are_there(a_gpu, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "measure", stop)
    file = tmp_path / "gpu.json"
    common = ["--target", "cuda-sm90", "--commit", OF["commit"], "--output", str(file)]
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--check", "--sanitize", "memcheck", *common])
    assert json.loads(file.read_text())["tests"] == "9 passed"

    def stop_after_the_first(tools, _):
        yield tools[0], "3 files: 0 errors"
        stop()

    monkeypatch.setattr(gpu.gpu_checks, "sanitize", stop_after_the_first)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(["--sanitize", "--only", *common])
    assert json.loads(file.read_text())["sanitizers"] == {"memcheck": "3 files: 0 errors"}

    def fail(_):
        raise gpu.gpu_checks.CheckError("tests: 1 failed")

    monkeypatch.setattr(gpu.gpu_checks, "run_tests", fail)
    assert gpu.main(["--check", "--only", *common]) == 1
    found = json.loads(file.read_text())
    assert "tests" not in found and list(found["sanitizers"]) == ["memcheck"]


def test_versions_without_a_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(gpu.versions()) == ["torch", "cuda"]
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.159.04\n")
    smi.chmod(0o755)
    assert gpu.versions()["driver"] == "580.159.04"


@pytest.mark.parametrize(
    "output, refusal", [("no/gpu.json", "its folder is not there"), ("", "cannot read")]
)
def test_an_output_that_cannot_be_is_told_first(a_gpu, tmp_path, capsys, output, refusal):
    with pytest.raises(SystemExit) as exit:
        gpu.main(["--target", "cuda-sm90", "--output", str(tmp_path / output)])
    assert exit.value.code == 2 and refusal in capsys.readouterr().err
