"""The build command: an artifact that runs, and one clear line for everything that is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm

from compiler import build
from model import random
from model.checkpoint import load_integer_model
from model.config import MODELS
from model.integer import Prefill
from runtime.artifact import Artifact

ROOT = Path(build.__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights of `tiny`, with a tokenizer that nothing here reads."""
    directory = tmp_path_factory.mktemp("checkpoint")
    random.write(MODELS["tiny"], directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def built(checkpoint, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The artifact of the generic target, by the command."""
    path = tmp_path_factory.mktemp("dist") / "tiny"
    dump = path.parent / "dump"
    options = ["--model", checkpoint, "--target", "generic", "-o", path, "--debug-dump", dump]
    command = [sys.executable, "-m", "compiler.build", *map(str, options)]
    return path, subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_five_facts(built):
    path, done = built
    assert (done.returncode, done.stderr) == (0, "")
    keys = [line.split()[0] for line in done.stdout.splitlines()]
    assert keys == ["model", "target", "size", "seconds", "where"]
    assert done.stdout.splitlines()[-1].split() == ["where", str(path)]
    assert sorted(entry.name for entry in path.iterdir()) == sorted(
        ["model.so", "params.bin", "config.json", "tokenizer.json", "artifact.json"]
    )


def test_debug_dump_parses(built):
    dump = built[0].parent / "dump"
    names = sorted(entry.name for entry in dump.iterdir())
    assert [name[0] for name in names] == list("012345")
    module = tvm.script.from_source((dump / names[1]).read_text())
    assert sorted(name.name_hint for name in module.functions)[0] == "decode_kv16"


def test_manifest(built):
    manifest = json.loads((built[0] / "artifact.json").read_text())
    assert manifest["kv_bits"] == [16, 4, 3]
    assert (manifest["default_kv_bits"], manifest["context_length"]) == (3, 256)
    names = [tensor["name"] for tensor in manifest["tensors"]]
    assert names[:5] == ["embed.table", "embed.scale", "rope.cos", "rope.sin", "layers.0.attn_norm"]
    assert names[-1] == "norm"
    kernels = manifest["record"]["kernels"]
    assert {kernel["family"] for kernel in kernels} == {"generic"}
    assert len(kernels) == len({json.dumps(kernel) for kernel in kernels})


def test_artifact_runs_as_the_reference(built, checkpoint):
    artifact = Artifact.open(built[0])
    vm = tvm.runtime.vm.VirtualMachine(
        tvm.runtime.load_module(str(built[0] / "model.so")), tvm.cpu()
    )
    reference = load_integer_model(checkpoint)
    caches = reference.empty_caches(3, slots=1, context=16)
    inputs = [np.arange(5), np.zeros(5, int), np.arange(5), np.array([4])]
    compiled = vm["prefill_kv3"](
        *map(tvm.runtime.tensor, inputs),
        [tvm.runtime.tensor(cache.numpy()) for cache in caches],
        [tvm.runtime.tensor(array) for array in artifact.params.values()],
    ).numpy()
    arguments = [reference.rope.cos.new_tensor(array).long() for array in inputs]
    expected = Prefill(reference, 3)(*arguments, caches)[0].numpy()
    np.testing.assert_allclose(compiled, expected, atol=2e-3 * abs(expected).max())


def broken(checkpoint: Path, tmp_path: Path, change) -> Path:
    copy = shutil.copytree(checkpoint, tmp_path / "broken")
    change(copy)
    return copy


def truncate(directory: Path) -> None:
    weights = directory / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)


def widen(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 168}))


BROKEN = [
    (truncate, "model.safetensors: truncated or not safetensors"),
    (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors beside config.json"),
    (lambda d: (d / "config.json").unlink(), "nor a directory with config.json and"),
    (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
    (widen, "layers.0.gate.w"),
]


@pytest.mark.parametrize("change, message", BROKEN, ids=[message for _, message in BROKEN])
def test_broken_checkpoint(checkpoint, tmp_path, capsys, change, message):
    options = ["--model", str(broken(checkpoint, tmp_path, change)), "--target", "generic"]
    assert_refused(capsys, tmp_path / "out", options, message)


REFUSED = [
    (["--target", "vax"], "target: asked for 'vax'; possible: generic, x86-avx2, native"),
    (["--model", "nope"], "model 'nope': neither a shipped model (novels-42m"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=["target", "model"])
def test_unknown(tmp_path, capsys, options, message):
    assert_refused(capsys, tmp_path / "out", options, message)


def test_no_linker(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ["--model", str(checkpoint), "--target", "generic"]
    assert_refused(capsys, tmp_path / "out", options, "found none of gcc, cc, clang on the PATH")


def assert_refused(capsys, output: Path, options: list[str], message: str) -> None:
    """Exit code 2, one line on stderr, nothing on stdout and nothing on the disk."""
    beside = sorted(output.parent.iterdir())
    assert build.main([*options, "-o", str(output)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(output.parent.iterdir()) == beside


def test_refusal_of_the_command():
    command = [sys.executable, "-m", "compiler.build", "--target", "vax"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("compiler.build: target: asked for 'vax'")
    assert done.stderr.count("\n") == 1
