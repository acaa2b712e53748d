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
    assert ([row["name"] for row in rows], failed) == (["first", "last"], ["unbuilt", "wrong"])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "RuntimeError gemv unbuilt: nvcc: no"
    assert told[1].startswith("WRONG gemv wrong: 1 of 9 elements")


def test_a_step_is_kept_before_prompts_are_measured(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no peer")

    def measure(engine, context):
        return {"context": context, "us": 1.0, "range_us": [1.0, 1.0], "steps": 1, "launches": 0,
                "kinds": []}  # fmt: skip

    monkeypatch.setattr(gpu.gpu_step, "measure", measure)
    monkeypatch.setattr(gpu.gpu_prefill, "compare", fail)
    artifact = SimpleNamespace(model="tiny", context_length=100)
    kept = tmp_path / "gpu.json"
    with pytest.raises(RuntimeError, match="no peer"):
        for facts in gpu.models(SimpleNamespace(artifact=artifact, kv_bits=3)):
            gpu.keep(kept, facts)
    found = json.loads(kept.read_text())
    assert (found["model"], found["kv_bits"], found["step"]["context"]) == ("tiny", 3, 52)
