"""What a step's launches are charged with: no GPU is needed."""

from types import SimpleNamespace

import pytest

from benchmarks import gpu_prefill, gpu_step
from benchmarks.gpu_step import Launch


def steps(count, gap=1000.0):
    """`count` steps of a 5 us matmul, and a norm that begins 2 us before its end and takes 4."""
    return [
        launch
        for start in (gap * i for i in range(count))
        for launch in (Launch("matmul", start, start + 5), Launch("norm", start + 3, start + 7))
    ]


def test_launches_add_up_to_the_span():
    found = gpu_step.summarize(steps(4))
    assert (found["us"], found["range_us"], found["steps"], found["launches"]) == (7, [7, 7], 4, 2)
    assert [(kind["name"], kind["a_step"], kind["us_a_step"]) for kind in found["kinds"]] == [
        ("matmul", 1, 5),
        ("norm", 1, 2),
    ]
    assert sum(kind["us_a_step"] for kind in found["kinds"]) == found["us"]


def test_a_cut_step_does_not_count():
    found = gpu_step.summarize(steps(4)[1:])
    assert (found["steps"], found["us"]) == (3, 7)


def test_launches_that_lie_close_are_one_step():
    assert [len(step) for step in gpu_step.split(steps(3, gap=gpu_step.SILENCE))] == [6]


def test_tokens_follow_each_other():
    """Each is fed to the next step, one position on; the first steps do not count."""
    seen = []

    def decode_token(token, slot, position, sampler):
        seen.append((token, slot, position))
        return token + 1

    found = gpu_step.time_tokens(SimpleNamespace(decode_token=decode_token), 5, 512)
    count = gpu_step.WARM + gpu_step.STEPS
    assert seen == [(5 + i, 0, 512 + i) for i in range(count)]
    low, high = found["range_us"]
    assert 0 < low <= found["us"] <= high


@pytest.mark.parametrize("command", [gpu_step, gpu_prefill])
def test_refusals(tmp_path, command, monkeypatch, capsys):
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    assert command.main([str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    other = SimpleNamespace(target="x86-avx2")
    monkeypatch.setattr(gpu_step.Artifact, "open", lambda *_: other)
    assert command.main([str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "is for x86-avx2; possible: one for cuda" in line


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu_step.torch.cuda, "is_available", lambda: False)
    assert gpu_step.main(["dist"]) == 2
    assert "needs a GPU that PyTorch can use, found none" in capsys.readouterr().err
