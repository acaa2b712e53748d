"""The plot of the GPU's figures, from the file that the repository keeps."""

import json

import pytest

from benchmarks import gpu_plot


def test_every_engine_of_a_row():
    row = {"us": 2.0, "rivals": {"bf16": {"us": 6.0, "spread_us": 0.1}}, "published_us": 5.5}
    assert gpu_plot.times(row) == {"ours": 2.0, "bf16": 6.0, gpu_plot.PUBLISHED: 5.5}


def test_draws_the_kept_file(tmp_path, capsys):
    output = tmp_path / "gpu.png"
    assert gpu_plot.main(["-o", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{output}\n"


def test_panels_of_a_whole_model():
    kinds = [{"name": "norm_matmul_kernel", "a_step": 30, "us_a_step": 90.0}]
    measured = {
        "step": {"context": 512, "us": 764.7, "kinds": kinds},
        "prefill": [{"prompt": 512, "ours_ms": 5.0, "bf16_ms": 4.0, "ratio": 0.8}],
    }
    (title, launches), (_, prompts) = gpu_plot.model_panels(measured)
    assert title == "decode step at 512: 765 us"
    assert [gpu_plot.times(row) for row in launches] == [{"ours": 90.0}]
    assert list(gpu_plot.times(prompts[0]).values()) == [5000.0, 4000.0]
    assert list(gpu_plot.model_panels({})) == []


@pytest.mark.parametrize(
    "text",
    [
        None,
        "no json",
        "[]",
        "5",
        json.dumps({"rows": [{}]}),
        json.dumps({"rows": [{"group": "gemm", "name": "x"}]}),
        json.dumps({"device": "H100", "commit": "e176c79483b5", "rows": []}),
    ],
)
def test_refuses_other_files(tmp_path, capsys, text):
    file = tmp_path / "gpu.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as exit:
        gpu_plot.main([str(file), "-o", str(tmp_path / "gpu.png")])
    assert exit.value.code == 2
    told = capsys.readouterr().err
    assert "possible: a file that benchmarks.gpu wrote" in told
    assert ("it has no timings" in told) == (text is not None and "H100" in text)


@pytest.mark.parametrize("output", ["no/gpu.png", "gpu.none"])
def test_an_output_that_cannot_be_written_is_told_as_such(tmp_path, capsys, output):
    with pytest.raises(SystemExit) as exit:
        gpu_plot.main(["-o", str(tmp_path / output)])
    told = capsys.readouterr().err
    assert exit.value.code == 2 and f"cannot write {tmp_path / output}: " in told


def test_a_model_without_kernels_is_drawn(tmp_path):
    kinds = [{"name": "norm_matmul_kernel", "a_step": 30, "us_a_step": 90.0}]
    step = {"context": 512, "us": 764.7, "kinds": kinds}
    file, output = tmp_path / "gpu.json", tmp_path / "gpu.png"
    measured = {"device": "H100", "commit": "e176c79483b5", "rows": [], "step": step}
    file.write_text(json.dumps(measured))
    assert gpu_plot.main([str(file), "-o", str(output)]) == 0 and output.is_file()
