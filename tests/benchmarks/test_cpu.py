"""benchmarks/cpu.py without a measurement: its workers' protocol, its refusals, its table."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import cpu, cpu_bench, cpu_page, cpu_worker
from benchmarks.commit import commit
from benchmarks.worker import Worker, WorkerError
from schedules import targets
from schedules.targets import TARGETS

ECHO = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks.worker import serve
class Echo:
    def double(self, number): print("noise of a library"); return {{"seconds": 2 * number}}
    def fail(self): raise ValueError("no such\\nthing")
    def end(self): sys.exit(3)
    def wait(self): print("waiting", file=sys.stderr, flush=True); time.sleep(60)
serve(Echo())
"""


@pytest.fixture
def echo(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(root=str(Path(cpu.__file__).parents[1])))
    worker = Worker("echo", sys.executable, script)
    yield worker
    worker.close()


@pytest.fixture
def generic_artifact(tmp_path, monkeypatch):
    """A directory that opens as an artifact."""
    (tmp_path / "artifact.json").touch()
    artifact = SimpleNamespace(context_length=4096, target="generic", kv_bits=(16, 3))
    monkeypatch.setattr(cpu.Artifact, "open", lambda *_, **__: artifact)
    return tmp_path


def test_worker_answers_in_order(echo):
    assert [echo.ask("double", number=n)["seconds"] for n in (1, 2, 3)] == [2, 4, 6]


def test_worker_that_fails_says_why_and_goes_on(echo):
    with pytest.raises(WorkerError, match="echo: fail: ValueError: no such thing"):
        echo.ask("fail")
    assert echo.ask("double", number=1)["seconds"] == 2


def test_worker_that_ends(echo):
    with pytest.raises(WorkerError, match="echo: ended while asked to end, exit 3"):
        echo.ask("end")


def test_worker_that_ended_before_it_was_asked(echo):
    echo._process.kill()
    echo._process.wait()
    with pytest.raises(WorkerError, match="ended while asked"):
        echo.ask("echo", text="x" * 10)
    echo.close()


def test_worker_whose_asker_has_ended_is_silent(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(ECHO.format(root=str(Path(cpu.__file__).parents[1])))
    reader, writer = os.pipe()
    os.close(reader)
    request = json.dumps({"do": "double", "number": 1}).encode()
    command = [sys.executable, script]
    done = subprocess.run(
        command, input=request, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"noise of a library\n")


def test_worker_that_cannot_start(tmp_path):
    with pytest.raises(WorkerError, match="peer: cannot run /nowhere/python: No such file"):
        Worker("peer", "/nowhere/python", tmp_path / "script.py")


@pytest.mark.parametrize(
    "options, problem",
    [
        (["{}"], "it has no artifact.json"),
        (["{}", "--peer-kv", "f8"], "invalid choice: 'f8'"),
        (["{}", "-t", "0"], "-t/--threads: asked for '0'; possible: whole numbers from 1 on"),
        (["{}", "--only", "speed"], "invalid choice: 'speed'"),
    ],
)
def test_refusals(tmp_path, options, problem):
    command = [sys.executable, "-m", "benchmarks.cpu", *(o.format(tmp_path) for o in options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and problem in done.stderr, done.stderr


# where tests run in the background, SIGINT is ignored by all that they start
CTRL_C = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {root!r})
from benchmarks.worker import Worker
from pathlib import Path
worker = Worker("echo", sys.executable, Path({script!r}))
try: worker.ask("wait")
except KeyboardInterrupt: worker.close(); sys.exit("one line")
"""


def test_ctrl_c_is_not_the_workers(tmp_path):
    """A terminal sends it to all processes in its foreground."""
    root, script = str(Path(cpu.__file__).parents[1]), tmp_path / "echo.py"
    script.write_text(ECHO.format(root=root))
    code = CTRL_C.format(root=root, script=str(script))
    asking = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, process_group=0
    )
    assert asking.stderr and asking.stderr.readline() == "waiting\n"
    os.killpg(asking.pid, signal.SIGINT)
    assert asking.stderr.read() == "one line\n" and asking.wait() == 1


def test_answer_that_is_none(tmp_path):
    """Of what is no Python, say."""
    worker = Worker("peer", "/bin/echo", tmp_path / "script.py")
    with pytest.raises(WorkerError, match=r"peer: no answer to hello, but '.*script.py'"):
        worker.ask("hello")
    worker.close()


def test_every_option_is_explained_with_its_default(capsys):
    with pytest.raises(SystemExit):
        cpu.parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for default in ("ours alone", "both", "f16", "results", "128,512", "64", "5", "all"):
        assert f"(default: {default})" in told, default
    for group in cpu.GROUPS:
        assert told.count(f" {group} ") >= 1, group


def test_table_has_medians_ranges_ratios_and_the_share_of_the_bandwidth():
    samples = {"ours": [1.0, 2.0, 4.0], "TQ2_0": [4.0, 4.0, 8.0]}
    row = cpu_page.Row("model", "tg8", 2, 8, "token", samples, {"ours": 10.0, "TQ2_0": 10.0}, 20.0)
    cells = [cell.strip() for cell in cpu_page.show_row(samples, row).strip("| ").split("|")]
    ours, peer = "4 (2-8) token/s", "2 (1-2) token/s"
    assert cells == ["model", "tg8", "2", ours, peer, "2.00", "25%"]
    json.dumps(cpu.asdict(row))


def test_calls_are_shown_by_their_time():
    samples = {"ours": [1e-6, 2e-6, 4e-6], "dense": [8e-6, 6e-6, 10e-6]}
    row = cpu_page.Row("kernels", "launch", 2, 1, "us", samples)
    cells = [cell.strip() for cell in cpu_page.show_row(samples, row).strip("| ").split("|")]
    assert cells[3:6] == ["2 (1-4) us", "8 (6-10) us", "4.00"]


def test_plots_are_of_this_page_alone(tmp_path):
    for name in cpu_page.PLOTS:
        (tmp_path / f"{name}.png").write_text("of a page before")
    cpu_page.plot(["ours"], [], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, refusal",
    [
        (["-p", "16,2000"], "--prompts: asked for 2000 positions; possible: 1 to 1024"),
        (["-n", "1025"], "--decode: asked for 1025 positions; possible: 1 to 1024"),
        (["-r", "100"], "--repetitions: asked for 1617 positions; possible: 1 to 1024"),
        (["-p", "2000", "--only", "kernels"], None),
        (["-p", "1024", "-n", "1024"], None),
    ],
)
def test_positions_are_checked_before_anything_is_measured(tmp_path, options, refusal):
    (tmp_path / "artifact.json").touch()
    parsed = cpu.parse([str(tmp_path), *options])
    if refusal is None:
        return cpu.check_positions(parsed, 1024)
    with pytest.raises(WorkerError, match=refusal):
        cpu.check_positions(parsed, 1024)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("ending", [WorkerError("ours: ended"), KeyboardInterrupt(), None])
def test_what_is_measured_is_kept(tmp_path, generic_artifact, monkeypatch, capsys, ending, rows):
    """A group that fails, Ctrl-C, or SIGTERM, before and after the first row."""

    class Bench:
        def __init__(self, options, target):
            self.options, self.target, self.rows, self.versions = options, target, [], {}
            self.workers, self.engines = {"ours": None}, ["ours", cpu_bench.DENSE]
            self.manifest, self.kv_bits, self.commit = {"model": "tiny"}, 3, "0123abc"

        def close(self):
            pass

    def measure(bench):
        bench.rows += rows * [cpu_page.Row("model", "pp8", 1, 8, "token", {"ours": [1.0]})]
        if ending:
            raise ending
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cpu, "Bench", Bench)
    monkeypatch.setattr(cpu, "measure_all", measure)
    arguments = [str(generic_artifact), "-o", str(tmp_path / "out"), "-t", "1"]
    if ending:
        assert cpu.main(arguments) == (130 if isinstance(ending, KeyboardInterrupt) else 2)
    else:
        with pytest.raises(SystemExit) as exit:
            cpu.main(arguments)
        assert exit.value.code == 143
    told, page = capsys.readouterr().err, tmp_path / "out" / "cpu.md"
    assert told.count("\n") == (1 if ending else 0)
    if isinstance(ending, KeyboardInterrupt):
        assert (f"{page} has what was measured" in told) == bool(rows)
    if not rows:
        assert not page.exists()
        return
    assert "| model | pp8 | 1 | 8 (8-8) token/s |" in page.read_text()
    assert "ours: tiny for generic" in page.read_text()
    assert "KV cache: ours 3 bits" in page.read_text() and "commit: 0123abc" in page.read_text()


HERE = [TARGETS["generic"], TARGETS["x86-avx2"], TARGETS["x86-avxvnni"]]


@pytest.mark.parametrize(
    "asked, artifact, group, found",
    [
        (None, "x86-avx2", "model", "x86-avx2"),
        ("x86-avx2", "x86-avx2", "context", "x86-avx2"),
        ("x86-avx2", "x86-avxvnni", "kernels", "x86-avx2"),
    ],
)
def test_target(monkeypatch, asked, artifact, group, found):
    monkeypatch.setattr(targets, "cpus_here", lambda: HERE)
    assert cpu.choose_target(asked, artifact, [group]) == found


@pytest.mark.parametrize(
    "asked, artifact, group, refusal",
    [
        ("vax", "x86-avx2", "kernels", "asked for vax, there is no such target; possible: native,"),
        ("x86-amx", "x86-avx2", "kernels", "asked for x86-amx, this CPU does not run it; possible"),
        (None, "cuda-fat", "model", "asked for cuda-fat, this CPU does not run it; possible"),
        ("x86-avx2", "x86-avxvnni", "model", "x86-avx2, the artifact is for x86-avxvnni; possible"),
    ],
)
def test_target_that_cannot_be_measured(monkeypatch, asked, artifact, group, refusal):
    monkeypatch.setattr(targets, "cpus_here", lambda: HERE)
    with pytest.raises(WorkerError, match=refusal):
        cpu.choose_target(asked, artifact, [group])


def test_wrong_target_is_one_line(generic_artifact, capsys):
    assert cpu.main([str(generic_artifact), "--target", "vax"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("benchmarks.cpu: error: target: asked for vax") and told.count("\n") == 1


def test_kernels_are_of_the_target_that_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    worker = cpu_worker.Ours()
    for name in ("generic", "native"):
        worker.use_target(name)
        worker.prepare("launch", is_launched_by_us=False, copies=2)
        assert worker.kernels.target == targets.find(name)
        assert worker.kernel(threads=1)["seconds"] > 0
    assert not list(tmp_path.glob("benchmark-*"))


def test_the_read_beside_a_kernel_is_of_its_own_copies():
    worker = cpu_worker.Ours()
    worker.use_target("generic")
    for kind in ({"kind": "matmul", "act_bits": 4}, {"kind": "sparse", "zeros": 0.5}):
        nbytes = worker.prepare(n=64, k=256, m=1, copies=3, **kind)["bytes"]
        assert worker.read(threads=1)["seconds"] > 0
        for calls in worker.reads:  # (memory, out) of each copy
            assert [call.args[0].shape[0] for call in calls] == [nbytes] * 3
            assert len({np.from_dlpack(call.args[0]).ctypes.data for call in calls}) == 3
    worker.prepare("launch", is_launched_by_us=True, copies=2)
    assert not worker.reads and not len(worker.kernels.copies)


@pytest.mark.parametrize("folder", ["/proc/results", "{}/artifact.json/x"])
def test_folder_that_cannot_be_written(generic_artifact, capsys, folder):
    output = folder.format(generic_artifact)
    assert cpu.main([str(generic_artifact), "--target", "generic", "-o", output]) == 2
    told = capsys.readouterr().err
    assert f"--output: asked for {output}, nothing can be written there: " in told
    assert "possible:" in told and told.count("\n") == 1


def test_kv_bits_that_the_artifact_lacks(generic_artifact, capsys):
    assert cpu.main([str(generic_artifact), "--kv-bits", "8"]) == 2
    assert "--kv-bits: asked for 8; possible: 16, 3\n" in capsys.readouterr().err


def test_the_page_says_what_its_figures_are_of():
    options = SimpleNamespace(peer_kv="q4_0", repetitions=7)
    bench = SimpleNamespace(
        options=options, commit="0123abc", kv_bits=3, target="generic",
        manifest={"model": "tiny"}, versions={"TQ2_0": "llama 1", "TQ1_0": "llama 1"},
    )  # fmt: skip
    facts = cpu.host_facts(bench)
    assert facts["KV cache"] == "ours 3 bits, the peer's q4_0" and facts["repetitions"] == 7
    assert facts["commit"] == "0123abc" and facts["date"] and facts["peer"] == "llama 1"


def test_commit_is_of_the_checkout_wherever_it_is_asked(tmp_path, monkeypatch):
    here = commit()
    monkeypatch.chdir(tmp_path)
    assert commit() == here
