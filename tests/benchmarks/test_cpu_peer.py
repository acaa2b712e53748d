"""The peer of benchmarks/cpu.py without the peer: its files, its shapes, its refusals."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import cpu_bench, cpu_peer
from benchmarks.worker import WorkerError

TINY = {
    "vocab_size": 300,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "name": "tiny",
}


class Peer:
    """Writes the shape it is asked for, or ends half-way."""

    def __init__(self, ends: BaseException | None = None):
        self.ends, self.written = ends, 0

    def ask(self, do, path, kind, shape):
        assert do == "write_model"
        self.written += 1
        Path(path).write_text(json.dumps(shape)[: 10 if self.ends else None])
        if self.ends:
            raise self.ends


def test_a_file_is_of_one_shape_and_format(tmp_path):
    peer, other = Peer(), {**TINY, "num_hidden_layers": 3}
    files = [cpu_peer.written(peer, tmp_path, "TQ2_0", shape) for shape in (TINY, other)]
    files.append(cpu_peer.written(peer, tmp_path, "TQ1_0", TINY))
    assert len(set(files)) == 3 and files == [
        cpu_peer.model_file(tmp_path, kind, shape)
        for kind, shape in (("TQ2_0", TINY), ("TQ2_0", other), ("TQ1_0", TINY))
    ]
    assert json.loads(files[1].read_text())["num_hidden_layers"] == 3
    assert cpu_peer.written(peer, tmp_path, "TQ2_0", {**TINY, "name": "same"}) == files[0]
    assert peer.written == 3 and sorted(tmp_path.iterdir()) == sorted(files)


@pytest.mark.parametrize("shape", [field for field in cpu_peer.SHAPE])
def test_every_field_of_a_shape_is_in_the_name(tmp_path, shape):
    other = {**TINY, shape: TINY[shape] * 2}
    assert cpu_peer.model_file(tmp_path, "TQ2_0", TINY) != cpu_peer.model_file(
        tmp_path, "TQ2_0", other
    )


@pytest.mark.parametrize("ends", [KeyboardInterrupt(), WorkerError("no space left")])
def test_half_a_file_is_none(tmp_path, ends):
    with pytest.raises(type(ends)):
        cpu_peer.written(Peer(ends), tmp_path, "TQ2_0", TINY)
    assert not list(tmp_path.iterdir())
    file = cpu_peer.written(Peer(), tmp_path, "TQ2_0", TINY)
    assert json.loads(file.read_text())["vocab_size"] == 300


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    class Broken:
        def ask(self, do, **arguments):
            raise WorkerError("TQ2_0: load: RuntimeError: llama.cpp cannot read this file")

    path = tmp_path / "random.gguf"
    with pytest.raises(WorkerError, match=f"cannot read this file; possible: delete {path}"):
        cpu_peer.load(Broken(), path, threads=1)


@pytest.mark.parametrize(
    "wrong, groups, refusal",
    [
        ({"hidden_size": 128}, ["kernels"], "peer: asked for hidden_size 128, its formats pack"),
        ({"intermediate_size": 1000}, ["model"], "intermediate_size 1000, .*a multiple of 256"),
        ({"head_dim": 64}, ["context"], "head_dim 64; possible: 128"),
        ({"head_dim": 64}, ["kernels"], None),
        ({}, ["model"], None),
    ],
)
def test_shapes(wrong, groups, refusal):
    if refusal is None:
        return cpu_peer.check_shape({**TINY, **wrong}, groups)
    with pytest.raises(WorkerError, match=refusal):
        cpu_peer.check_shape({**TINY, **wrong}, groups)


@pytest.fixture
def options(tmp_path):
    """Of a benchmark of an artifact in the shape of `TINY`."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "artifact.json").write_text(json.dumps({"default_kv_bits": 3}))
    names = SimpleNamespace(artifact=tmp_path, only=["model"], peers=["TQ2_0"], peer_python=None)
    return SimpleNamespace(**vars(names), kv_bits=None, commit=None)


@pytest.fixture
def started(monkeypatch):
    """The workers that were started."""
    found = []
    run = cpu_bench.Bench.run

    def record(self, name, python, script):
        found.append(name)
        return run(self, name, python, script)

    monkeypatch.setattr(cpu_bench.Bench, "run", record)
    return found


def test_a_peer_without_its_modules_is_one_line_before_anything_starts(
    tmp_path, options, started, capfd
):
    """Whatever this Python has: one that finds no module beside the peer's own."""
    (tmp_path / "bare").write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    (tmp_path / "bare").chmod(0o755)
    options.peer_python = str(tmp_path / "bare")
    with pytest.raises(WorkerError, match=r"TQ2_0: hello: ModuleNotFoundError: .*possible: --peer"):
        cpu_bench.Bench(options, "generic")
    assert started == ["TQ2_0"] and capfd.readouterr().err == ""


def test_a_shape_that_the_peer_cannot_hold_starts_nothing(options, started):
    (options.artifact / "config.json").write_text(json.dumps({**TINY, "hidden_size": 128}))
    options.peer_python = sys.executable
    with pytest.raises(WorkerError, match="hidden_size 128"):
        cpu_bench.Bench(options, "generic")
    assert not started
