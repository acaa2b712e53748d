"""An artifact opens without a copy, and whatever is wrong with one is refused in one line."""

import contextlib
import errno
import json
import mmap
import re

import numpy as np
import pytest
from fake_artifact import CONFIG, write_manifest

from runtime import Artifact, ArtifactError, Engine, RuntimeRefusal, host, tvm_runtime
from runtime.device import Cpu, open_device


def change(path, name, **values):
    """Change fields of a JSON file."""
    file = path / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refusal(path) -> str:
    with pytest.raises(ArtifactError) as caught:
        opened = Artifact.open(path)
        opened.open_library(open_device(opened.manifest))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_opens(artifact):
    opened = Artifact.open(artifact)
    assert (opened.model, opened.target, opened.default_kv_bits) == ("fake", "generic", 3)
    assert opened.kv_bits == (16, 4, 3) and opened.context_length == 64
    assert opened.shape.head_dim == 8 and opened.shape.eos_token_ids == (1,)
    assert list(opened.params) == ["unused", "norm"]
    assert opened.params["unused"].tolist() == np.arange(15).reshape(3, 5).tolist()
    assert opened.params_bytes == (artifact / "params.bin").stat().st_size


def test_parameters_are_not_copied(artifact):
    opened = Artifact.open(artifact)
    for tensor, array in zip(opened.parameters(Cpu()), opened.params.values(), strict=True):
        assert tvm_runtime.view(tensor).ctypes.data == array.ctypes.data
        assert array.ctypes.data % 4096 == 0


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without large pages")
@pytest.mark.parametrize("refused", [False, True])
def test_large_pages_are_asked_for(artifact, monkeypatch, refused):
    """What the kernel makes of it differs, and a kernel without them changes nothing."""
    asked = []

    class Memory(mmap.mmap):
        def madvise(self, *arguments):
            asked.append(arguments)
            if refused:
                raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Memory)
    assert Artifact.open(artifact).params["unused"].size == 15
    assert asked == [(mmap.MADV_HUGEPAGE,)]


def test_several_eos_tokens(own_artifact):
    (own_artifact / "config.json").write_text(json.dumps(CONFIG | {"eos_token_id": [1, 7]}))
    write_manifest(own_artifact)
    assert Artifact.open(own_artifact).shape.eos_token_ids == (1, 7)


def test_not_a_directory(artifact, tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "is not a directory" in refusal(artifact / "model.so")


def test_not_an_artifact(tmp_path):
    (tmp_path / "model.safetensors").touch()
    message = refusal(tmp_path)
    assert "it has no artifact.json, it holds model.safetensors" in message


@pytest.mark.parametrize("version", [None, 0, 1, "2"])
def test_other_format(own_artifact, version):
    write_manifest(own_artifact, format=version)
    assert f"format {version!r}, this runtime reads 2" in refusal(own_artifact)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udc80"], ids=["empty", "cut", "list", "binary"])
def test_manifest_is_not_json(own_artifact, text):
    (own_artifact / "artifact.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "artifact.json" in refusal(own_artifact)


@pytest.mark.parametrize("field", ["model", "kv_bits", "context_length", "library", "tensors"])
def test_missing_field(own_artifact, field):
    write_manifest(own_artifact, **{field: None})
    assert f"needs {field}, found nothing" in refusal(own_artifact)


@pytest.mark.parametrize(
    "fields, needed",
    [
        ({"prompt_rows": "x"}, "prompt_rows (a whole number from 1 on), found 'x'"),
        ({"prompt_rows": 0}, "prompt_rows (a whole number from 1 on), found 0"),
        ({"workspace_bytes": -5}, "workspace_bytes (a whole number from 0 on), found -5"),
        ({"levels": []}, "levels (dict), found []"),
        (
            {"levels": {"3": {"positions": 0, "bytes": 4}}},
            "levels.3.positions (a whole number from 1 on), found 0",
        ),
        ({"levels": {"3": {"bytes": 4}}}, "levels.3.positions, found nothing"),
    ],
)
def test_optional_field(own_artifact, fields, needed):
    write_manifest(own_artifact, **fields)
    assert f"needs {needed}" in refusal(own_artifact)


def test_default_cache_of_another_build(own_artifact):
    write_manifest(own_artifact, kv_bits=[])
    assert "which its kv_bits [] lack; possible: build it again" in refusal(own_artifact)


def places(value, path=()):
    """The path of everything inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*path, key)
        if isinstance(value[key], dict | list):
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("name", ["artifact.json", "config.json"])
def test_no_wrong_value_gets_past_a_refusal(own_artifact, name):
    """Whatever stands anywhere in the two files: an engine, or a refusal."""
    files = {n: (own_artifact / n).read_text() for n in ("artifact.json", "config.json")}
    for path in places(json.loads(files[name])):
        for wrong in (None, -1, 1 << 70, "x", [], {}, [None], True):
            damaged = json.loads(files[name])
            inside = damaged
            for key in path[:-1]:
                inside = inside[key]
            inside[path[-1]] = wrong
            (own_artifact / name).write_text(json.dumps(damaged))
            with contextlib.suppress(RuntimeRefusal):
                Engine.load(own_artifact, threads=1, verify=False)


def test_built_for_an_unknown_device(own_artifact):
    write_manifest(own_artifact, device="abacus")
    assert "the artifact is for 'abacus'; possible: cpu, cuda" in refusal(own_artifact)


def test_built_for_another_machine(own_artifact):
    write_manifest(own_artifact, machine="vax", target="vax-780")
    assert "target 'vax-780' is for vax hosts, this one is" in refusal(own_artifact)


def test_missing_cpu_flag(own_artifact, monkeypatch):
    write_manifest(own_artifact, cpu_flags=["avx2", "avx9000"], target="x86-avx9000")
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset({"avx2"}))
    message = refusal(own_artifact)
    assert "'x86-avx9000' needs the CPU flags avx9000, which" in message


def test_cpu_flags_by_their_compiler_names(monkeypatch):
    monkeypatch.setattr(host, "cpu_flags", lambda: frozenset({"asimd", "asimddp", "i8mm"}))
    assert host.missing_cpu_flags(["neon", "dotprod", "asimddp", "i8mm", "sve"]) == ["sve"]
    monkeypatch.setattr(host, "cpu_flags", lambda: None)
    assert host.missing_cpu_flags(["sve"]) == []


@pytest.mark.parametrize("name", ["params.bin", "model.so"])
def test_truncated(own_artifact, name):
    file = own_artifact / name
    file.write_bytes(file.read_bytes()[:-1])
    assert re.search(rf"{name} has \d+ bytes, artifact.json says \d+", refusal(own_artifact))


@pytest.mark.parametrize("name", ["params.bin", "model.so", "config.json", "tokenizer.json"])
def test_damaged(own_artifact, name):
    file = own_artifact / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    message = refusal(own_artifact)
    assert re.search(rf"{name}.* is damaged: sha256 \w{{12}}, artifact.json says", message)
    if name == "params.bin":
        assert "params.bin from byte 4096" in message  # the second of its chunks


@pytest.mark.parametrize("name", ["params.bin", "model.so", "config.json"])
def test_missing_file(own_artifact, name):
    (own_artifact / name).unlink()
    assert f"cannot read {name}: No such file" in refusal(own_artifact)


@pytest.mark.parametrize(
    "entry, expected",
    [
        ({"dtype": "complex64"}, "possible: int8"),
        ({"offset": 4097}, "offsets are multiples of 4096"),
        ({"offset": 1 << 40}, "does not fit"),
        ({"shape": [259]}, "does not fit"),
        ({"shape": None}, "needs tensors[1].shape (list), found None"),
        ({"bytes": -4, "shape": [-1]}, "does not fit"),
    ],
)
def test_bad_tensor(own_artifact, entry, expected):
    tensors = json.loads((own_artifact / "tensors.json").read_text())
    write_manifest(own_artifact, tensors=[tensors[0], tensors[1] | entry])
    assert expected in refusal(own_artifact)


def test_wrong_number_of_hashes(own_artifact):
    manifest = json.loads((own_artifact / "artifact.json").read_text())
    write_manifest(own_artifact, params=manifest["params"] | {"sha256": []})
    assert "0 hashes of params for 2 chunks" in refusal(own_artifact)


def test_not_a_library(own_artifact):
    (own_artifact / "model.so").write_bytes(b"\x7fELF but not for long")
    write_manifest(own_artifact)
    assert "cannot load" in refusal(own_artifact)


@pytest.mark.parametrize("name", ["vocab_size", "bos_token_id", "num_hidden_layers"])
def test_config_lacks_a_size(own_artifact, name):
    config = {key: value for key, value in CONFIG.items() if key != name}
    (own_artifact / "config.json").write_text(json.dumps(config))
    write_manifest(own_artifact)
    assert f"config.json needs {name}" in refusal(own_artifact)


def test_unverified_still_checks_sizes(own_artifact):
    change(own_artifact, "artifact.json", files={"config.json": "0"})
    Artifact.open(own_artifact, verify=False)
    (own_artifact / "params.bin").write_bytes(b"")
    with pytest.raises(RuntimeRefusal, match="0 bytes"):
        Artifact.open(own_artifact, verify=False)


def test_what_steps_take_by_part(artifact):
    """A prompt's unpacked levels beside the planned tensors: of every begun block of a slot."""
    opened = Artifact.open(artifact)
    assert opened.step_bytes(3, 1, 100) == {"activations": 0}
    levels = {"16": {"positions": 64, "bytes": 0}, "3": {"positions": 64, "bytes": 1000}}
    change(artifact, "artifact.json", workspace_bytes=5000, levels=levels)
    opened = Artifact.open(artifact)
    assert opened.step_bytes(16, 2, 100) == {"activations": 5000}
    assert opened.step_bytes(3, 2, 64) == {"activations": 5000, "unpacked levels": 2000}
    assert opened.step_bytes(3, 2, 65) == {"activations": 5000, "unpacked levels": 4000}


def test_every_part_is_weighed(artifact, monkeypatch):
    weighed = []
    monkeypatch.setattr(Cpu, "require", lambda _, parts: weighed.append(parts))
    levels = {"3": {"positions": 16, "bytes": 1000}}
    change(artifact, "artifact.json", workspace_bytes=5000, levels=levels)
    Engine.load(artifact, kv_bits=3, slots=2, context=17, threads=1)
    (parts,) = weighed
    assert list(parts) == ["weights", "KV cache", "activations", "unpacked levels"]
    assert parts["unpacked levels"] == 4000 and parts["weights"] > 0 < parts["KV cache"]
