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


def test_a_step_is_kept_before_prompts_are_measured(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no peer")

    monkeypatch.setattr(gpu.gpu_step, "measure", lambda engine, context: {"context": context})
    monkeypatch.setattr(gpu.gpu_prefill, "compare", fail)
    manifest = {"library": {"sha256": "4f"}}
    artifact = SimpleNamespace(model="tiny", context_length=100, manifest=manifest)
    kept = tmp_path / "gpu.json"
    found = {"failed": ["gemv x"], "prefill": "of an earlier run"}
    for _ in gpu.measure_model(SimpleNamespace(artifact=artifact, kv_bits=3), found):
        gpu.keep(kept, found)
        assert json.loads(kept.read_text())["step"] == {"context": 52}
    assert json.loads(kept.read_text()) == {
        "model": "tiny",
        "kv_bits": 3,
        "library_sha256": "4f",
        "step": {"context": 52},
        "failed": ["gemv x", "prefill"],
    }


FACTS = {"commit": "e176c79483b5", "device": "H100", "target": "cuda-sm90"}


@pytest.mark.parametrize(
    "kept, is_used",
    [
        (FACTS, True),
        (FACTS | {"commit": "0000000"}, False),
        (FACTS | {"device": "A100"}, False),
        (FACTS | {"target": "cuda-fat"}, False),
        ({}, False),
        ([], False),
    ],
)
def test_a_file_of_the_same_kernels_is_added_to(tmp_path, kept, is_used):
    file = tmp_path / "gpu.json"
    assert gpu.earlier(file, FACTS) == {}
    file.write_text(json.dumps(kept))
    assert gpu.earlier(file, FACTS) == (kept if is_used else {})


@pytest.mark.parametrize("commit", ["e176c79483b5-dirty", "unknown"])
def test_a_file_of_unknown_kernels_is_not(tmp_path, commit):
    facts = FACTS | {"commit": commit}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(facts))
    assert gpu.earlier(file, facts) == {}


def test_what_is_measured_anew_takes_the_place_of_what_was():
    def row(group, us):
        return {"group": group, "name": "x", "us": us}

    kept = {
        "date": "monday",
        "tests": "9 passed",
        "sanitizers": {"memcheck": "a", "racecheck": "b"},
        "failed": ["gemv y", "gemm y", "step"],
        "rows": [row("gemv", 1), row("gemm", 2)],
    }
    measured = {
        "date": "tuesday",
        "sanitizers": {"racecheck": "c"},
        "failed": ["gemv z"],
        "rows": [row("gemv", 3)],
    }
    assert gpu.join(kept, measured, ("gemv", "step")) == {
        "date": "tuesday",
        "tests": "9 passed",
        "sanitizers": {"memcheck": "a", "racecheck": "c"},
        "failed": ["gemm y", "gemv z"],
        "rows": [row("gemm", 2), row("gemv", 3)],
    }
    assert "sanitizers" not in gpu.join({}, {"failed": [], "rows": []}, ())
