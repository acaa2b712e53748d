"""The build command: an artifact that runs, and one clear line for everything that is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import compiler.ops  # noqa: F401, what R.bitnet means to the parser
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
    Tokenizer(WordLevel({"a": 0}, "a")).save(str(directory / "tokenizer.json"))
    return directory


def test_command(checkpoint, tmp_path):
    """One test for a build, which takes nearly all of the time."""
    path, dump = tmp_path / "dist" / "tiny", tmp_path / "dump"
    options = ["--model", checkpoint, "--target", "generic", "-o", path, "--debug-dump", dump]
    command = [sys.executable, "-m", "compiler.build", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    check_facts(done.stdout, path)
    check_dump(dump)
    check_manifest(path)
    check_runs_as_the_reference(path, checkpoint)


def check_facts(stdout: str, path: Path) -> None:
    keys = [line.split()[0] for line in stdout.splitlines()]
    assert keys == ["model", "target", "size", "seconds", "where"]
    assert stdout.splitlines()[-1].split() == ["where", str(path)]
    assert sorted(entry.name for entry in path.iterdir()) == sorted(
        ["model.so", "params.bin", "config.json", "tokenizer.json", "artifact.json"]
    )


def check_dump(dump: Path) -> None:
    names = sorted(entry.name for entry in dump.iterdir())
    assert [name[0] for name in names] == list("012345")
    module = tvm.script.from_source((dump / names[0]).read_text())
    assert sorted(name.name_hint for name in module.functions) == ["decode", "prefill"]


def check_manifest(path: Path) -> None:
    manifest = json.loads((path / "artifact.json").read_text())
    assert manifest["kv_bits"] == [16, 4, 3]
    assert (manifest["default_kv_bits"], manifest["context_length"]) == (3, 256)
    names = [tensor["name"] for tensor in manifest["tensors"]]
    assert names[:5] == ["embed.table", "embed.scale", "rope.cos", "rope.sin", "layers.0.attn_norm"]
    assert names[-1] == "norm"
    kernels = manifest["record"]["kernels"]
    assert {kernel["family"] for kernel in kernels} == {"generic"}
    assert len(kernels) == len({json.dumps(kernel) for kernel in kernels})


def check_runs_as_the_reference(path: Path, checkpoint: Path) -> None:
    """Prefill of the library as a runtime opens it, bit for bit."""
    artifact = Artifact.open(path)
    library = tvm.runtime.load_module(str(path / "model.so"))
    vm = tvm.runtime.vm.VirtualMachine(library, tvm.cpu())
    reference = load_integer_model(checkpoint)
    caches = reference.empty_caches(3, slots=1, context=16)
    inputs = [np.arange(5), np.zeros(5, int), np.arange(5), np.array([4])]
    compiled = vm["prefill_kv3"](
        *map(tvm.runtime.tensor, inputs),
        [tvm.runtime.tensor(cache.numpy()) for cache in caches],
        [tvm.runtime.tensor(array) for array in artifact.params.values()],
    )
    expected, _ = Prefill(reference, 3)(*map(torch.from_numpy, inputs), caches)
    np.testing.assert_array_equal(compiled.numpy(), expected.numpy())


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


def exchange_tokenizer(directory: Path) -> None:
    many = WordLevel({str(i): i for i in range(1000)}, "0")
    Tokenizer(many).save(str(directory / "tokenizer.json"))


BROKEN = [
    (truncate, "model.safetensors: truncated or not safetensors"),
    (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors beside config.json"),
    (lambda d: (d / "config.json").unlink(), "or a directory with config.json and"),
    (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
    (widen, "layers.0.gate.w"),
    (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json is no tokenizer: "),
    (exchange_tokenizer, "tokenizer.json has 1000 tokens, config.json 512; possible: the model's"),
]


@pytest.mark.parametrize("change, message", BROKEN, ids=[message for _, message in BROKEN])
def test_broken_checkpoint(checkpoint, tmp_path, capsys, change, message):
    options = ["--model", str(broken(checkpoint, tmp_path, change)), "--target", "generic"]
    assert_refused(capsys, tmp_path / "out", options, message)


REFUSED = [
    (["--target", "vax"], "target: asked for 'vax'; possible: generic, "),
    (["--model", "nope"], "model: asked for 'nope'; possible: novels-42m, or a"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=["target", "model"])
def test_unknown(tmp_path, capsys, options, message):
    assert_refused(capsys, tmp_path / "out", options, message)


def test_no_linker(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ["--model", str(checkpoint), "--target", "generic"]
    assert_refused(capsys, tmp_path / "out", options, "found none of gcc, cc, clang on the PATH")


def test_no_nvcc(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "gcc").symlink_to(shutil.which("gcc") or "gcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    options = ["--model", str(checkpoint), "--target", "cuda-sm86"]
    assert_refused(capsys, tmp_path / "out", options, "nvcc: cuda-sm86 needs it to compile")


def test_dump_that_is_a_file(checkpoint, tmp_path, capsys):
    (tmp_path / "file").touch()
    options = ["--model", str(checkpoint), "--debug-dump", str(tmp_path / "file")]
    assert_refused(capsys, tmp_path / "out", options, "file, cannot make it (File exists)")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError], ids=["plain", "by TVM"])
def test_interrupt(tmp_path, capsys, monkeypatch, raised):
    """TVM makes a RuntimeError of a KeyboardInterrupt within a pass."""

    def interrupted(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise raised from error

    monkeypatch.setattr(build, "build", interrupted)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert build.main(["-o", str(tmp_path / "out")]) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "compiler.build: interrupted; nothing was written\n"


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
    assert done.stderr.startswith("compiler.build: error: target: asked for 'vax'")
    assert done.stderr.count("\n") == 1
