"""Fixtures: a small but real artifact (fake_artifact.py), an engine on it, the commands."""

import shutil
import subprocess
import sys
from pathlib import Path

import fake_artifact  # loads the whole of TVM before the engine would load a part of it
import pytest

from runtime import Engine

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="package")
def artifact(tmp_path_factory) -> Path:
    """The artifact that no test may change."""
    directory = tmp_path_factory.mktemp("artifact")
    fake_artifact.write_artifact(directory)
    return directory


@pytest.fixture
def own_artifact(artifact, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(artifact, tmp_path / "own"))


@pytest.fixture(scope="package")
def engine(artifact) -> Engine:
    return Engine.load(artifact, threads=1, slots=3)


@pytest.fixture(scope="package")
def run_module():
    """run_module("runtime.generate", *arguments, input=b"") -> the finished process, as bytes."""

    def run(module: str, *arguments: str | bytes | Path, input: bytes = b""):
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, cwd=REPOSITORY, input=input, capture_output=True)

    return run
