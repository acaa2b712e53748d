"""Artifact files: alignment, packing, hashes by chunks, and replacing an older artifact."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from compiler import artifact_writer
from compiler.artifact_writer import Parameter, replacing, write_manifest, write_params
from compiler.config import BuildError
from schedules.layouts import LAYOUTS

RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-1, 2, (70, 20), dtype=np.int8)
SCALE = RNG.random(1500, dtype=np.float32)
PARAMETERS = [
    Parameter("scale", "float32", (1500,), None),
    Parameter("w", "uint8", LAYOUTS["pair_nibble"].packed_shape(70, 20), "pair_nibble"),
]


def test_params_are_packed_aligned_and_hashed_by_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact_writer, "CHUNK_BYTES", 1000)
    facts = write_params(tmp_path, PARAMETERS, {"scale": SCALE, "w": WEIGHT}.__getitem__)
    data = (tmp_path / "params.bin").read_bytes()
    scale, w = facts["tensors"]
    assert (scale["offset"], w["offset"]) == (0, 8192)
    assert data[: scale["bytes"]] == SCALE.tobytes()
    packed = np.frombuffer(data[w["offset"] :], np.uint8).reshape(w["shape"])
    np.testing.assert_array_equal(LAYOUTS[w["layout"]].unpack(packed, 70, 20), WEIGHT)
    chunks = [data[i : i + 1000] for i in range(0, len(data), 1000)]
    assert facts["params"]["bytes"] == len(data)
    assert facts["params"]["sha256"] == [hashlib.sha256(chunk).hexdigest() for chunk in chunks]


def test_tensor_of_another_shape_is_refused(tmp_path):
    with pytest.raises(BuildError, match=r"scale of the checkpoint is float32 \(3,\), expected"):
        write_params(tmp_path, PARAMETERS, lambda _: np.zeros(3, np.float32))


def write_artifact(path, content):
    with replacing(path) as directory:
        (directory / "model.so").write_text(content)
        write_manifest(directory, {"model": content}, [])


def left_beside(path):
    return [entry.name for entry in path.parent.iterdir() if entry != path]


def test_older_artifact_is_replaced(tmp_path):
    path = tmp_path / "a" / "artifact"
    write_artifact(path, "old")
    write_artifact(path, "new")
    manifest = json.loads((path / "artifact.json").read_text())
    assert manifest["model"] == "new"
    assert manifest["library"]["sha256"] == hashlib.sha256(b"new").hexdigest()
    assert left_beside(path) == []


@pytest.mark.parametrize("interruption", [OSError, KeyboardInterrupt])
def test_failure_leaves_the_older_artifact_and_nothing_else(tmp_path, interruption):
    path = tmp_path / "artifact"
    write_artifact(path, "old")
    with pytest.raises(interruption), replacing(path) as directory:
        (directory / "model.so").write_text("half")
        raise interruption
    assert (path / "model.so").read_text() == "old"
    assert left_beside(path) == []


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_artifact_is_not_replaced(tmp_path, kind):
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("keep")
    else:
        path.mkdir()
        (path / "keep").touch()
    with pytest.raises(BuildError, match="precious exists and is no artifact; possible: a new"):
        write_artifact(path, "new")
    assert path.exists() and left_beside(path) == []


def test_somebody_elses_file_beside_an_artifact_is_kept(tmp_path):
    path = tmp_path / "artifact"
    write_artifact(path, "old")
    (path / "notes.txt").touch()
    with pytest.raises(BuildError, match=r"holds notes\.txt besides an artifact; possible: a new"):
        write_artifact(path, "new")
    assert (path / "notes.txt").exists() and (path / "model.so").read_text() == "old"


def test_a_link_stays_and_what_it_points_at_is_replaced(tmp_path):
    path, link = tmp_path / "artifact", tmp_path / "link"
    write_artifact(path, "old")
    link.symlink_to("artifact")
    write_artifact(link, "new")
    assert link.is_symlink() and (path / "model.so").read_text() == "new"
    assert left_beside(path) == ["link"]


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildError, match="is the working directory; possible: a new path"):
        write_artifact(Path("."), "new")
    assert not any(tmp_path.iterdir())


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match=r"asked for .*file/x, cannot write in .*file \("):
        write_artifact(tmp_path / "file" / "x", "new")


def test_manifest_text_is_json_with_a_line_for_each_tensor():
    tensors = [{"name": "a", "shape": [1, 2]}, {"name": "b", "shape": []}]
    manifest = {"format": 1, "tensors": tensors, "record": {"kernels": tensors, "versions": {}}}
    text = artifact_writer.to_lines(manifest)
    assert json.loads(text) == manifest
    assert text.count('\n  {"name": "a", "shape": [1, 2]},\n  {"name": "b", "shape": []}\n') == 1
