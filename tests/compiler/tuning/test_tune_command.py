"""`python -m compiler.tune`: what it refuses, in one line, and a whole run of it."""

import os
import signal
from pathlib import Path

import pytest

from compiler import head_bits, tune
from compiler.kernels import knobs_of
from compiler.tuning import store
from model.config import MODELS
from schedules import targets
from schedules.targets import find

REFUSED = {
    "target": (["--target", "vax"], "target: asked for 'vax'; possible: generic, "),
    "model": (["--model", "nope"], "model: asked for 'nope'; possible: novels-42m, shapes"),
    "variant": (["--model", "tiny", "--variant", "x"], "variant: asked for 'x'; possible: "),
    "trials": (["--trials", "0"], "trials: asked for 0; possible: 1 and more"),
    "threads": (["--threads", "9999"], "threads: asked for 9999; possible: 1 to "),
    "minutes": (["--minutes", "nan"], "minutes: asked for nan; possible: above 0"),
    "cold": (["--cold-mib", "-1"], "cold-mib: asked for -1; possible: 1 and more"),
    "output": (["--report", "--output", "/dev/null/x"], "output: asked for /dev/null/x, cannot"),
    "report": (["--output", "x"], "output: asked for x without --report; possible: --report"),
    "port": (["--rpc", "a:99999", "--key", "k"], "rpc: asked for 'a:99999'; possible: HOST:PORT"),
    "rpc alone": (["--rpc", "127.0.0.1:9190"], "rpc: --rpc HOST:PORT and --key KEY go together"),
    "rpc": (["--rpc", "nowhere", "--key", "k"], "rpc: asked for 'nowhere'; possible: HOST:PORT"),
    "tracker": (["--rpc", "127.0.0.1:1", "--key", "k"], "rpc: no tracker at 127.0.0.1:1"),
    "loopback": (["--rpc", "1", "--key", "k"], "rpc: no tracker at 127.0.0.1:1"),
    "gpu": (["--target", "cuda-sm90"], "target: cuda-sm90 does not run on this host; possible"),
    "machine": (["--target", "arm-neon"], "target: arm-neon does not run on this host; possible"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(options, message, capsys, tmp_path):
    assert tune.main([*options, "--records", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compiler.tune: error: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [[], ["--rpc", "127.0.0.1:1", "--key", "k"]], ids=["", "rpc"])
def test_no_gpu(options, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(targets, "compute_capability", lambda: None)
    assert tune.main(["--target", "cuda", "--records", str(tmp_path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "asked for cuda, but tuning runs the kernels and no GPU is here; possible: " in line
    assert "--rpc HOST:PORT --key KEY with --target cuda-sm80|" in line and "fat" not in line


def test_report_of_no_records(tmp_path, capsys):
    missing = tmp_path / "nope"
    assert tune.main(["--report", "--records", str(missing)]) == 2
    assert f"records: asked for {missing}; possible: a directory of" in capsys.readouterr().err


def test_no_compiler(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert tune.main(["--target", "generic"]) == 2
    assert "possible: apt-get install gcc" in capsys.readouterr().err


def test_command(tmp_path, capsys, monkeypatch):
    """The shapes of `tiny` on this CPU, by the command; then an interrupted one."""
    monkeypatch.chdir(tmp_path)
    bits = head_bits.choose(None, MODELS["tiny"], find("native"))
    op = "int8_matmul" if bits == 8 else "grouped_matmul"
    options = ["--model", "tiny", "--ops", op, "--trials", "2", "--cold-mib", "1"]
    if not any(len(values) > 1 for f in ("avx2", "neon") for values in knobs_of_family(f)):
        pytest.skip("no kernel of this machine's has knobs")
    assert tune.main([*options, "--records", "here", "--resume"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("resume: no records in here/") and "; begins anew\n" in err
    path = Path(out.split()[1])
    assert {r.op for r in store.read(path).records} == {op}
    assert "2/2" in err and "done" in err
    monkeypatch.setattr(tune, "tune", lambda config: os.kill(os.getpid(), signal.SIGINT))
    assert tune.main(options) == 130
    assert "what is measured is kept, --resume goes on" in capsys.readouterr().err
    monkeypatch.setattr(tune, "report", lambda config: os.kill(os.getpid(), signal.SIGINT))
    assert tune.main(["--report"]) == 130
    assert "interrupted; no report is written" in capsys.readouterr().err


def knobs_of_family(family: str) -> list[tuple[int, ...]]:
    try:
        return list(knobs_of("int8_matmul", family).values())
    except ImportError:
        return []
