"""The commands, as processes: what they print, and one line with exit code 2 for bad input."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_artifact import write_manifest

from runtime import bench, generate

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATE, BENCH = "runtime.generate", "runtime.bench"
GREEDY = ("--temperature", "0", "-t", "1")
QUICK = ("-p", "9", "-n", "5", "-r", "2", "-t", "1")


def test_generate_streams_text_and_reports(run_module, artifact):
    done = run_module(GENERATE, artifact, "--prompt", "abc", "-n", "5", *GREEDY)
    assert done.returncode == 0 and done.stdout == b"defgh\n"
    report = done.stderr.decode()
    assert re.search(r"^prefill  4 tokens, [\d.]+ tokens/s$", report, re.M)
    assert re.search(r"^decode   4 tokens, [\d.]+ tokens/s$", report, re.M)
    assert re.search(
        r"^memory   weights 5.13 kB mapped, KV cache [\d.]+ kB \(3 bits, 64 tokens\), "
        r"process [\d.]+ MB, peak [\d.]+ MB$", report, re.M,
    )  # fmt: skip


@pytest.mark.parametrize("how", ["file", "dash", "file-dash"])
def test_generate_reads_the_prompt_elsewhere(run_module, artifact, tmp_path, how):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"abc")
    source = {"file": ["--prompt-file", file], "dash": ["-"], "file-dash": ["--prompt-file", "-"]}
    done = run_module(GENERATE, artifact, *source[how], "-n", "2", *GREEDY, input=b"abc")
    assert done.stdout == b"de\n"


def test_generate_json(run_module, artifact):
    options = ("--prompt", "abc", "-n", "3", "--kv-bits", "16", "--context", "32", "--json")
    done = run_module(GENERATE, artifact, *options, *GREEDY)
    assert done.stderr == b""
    found = json.loads(done.stdout)
    assert found["text"] == "def" and found["prompt"] == "abc" and found["finish"] == "length"
    assert found["prefill"]["tokens"] == 4 and found["decode"]["tokens"] == 2
    assert found["decode"]["tokens_per_second"] > 0
    # 2 layers, 2 heads, keys and values of 32 positions of 8 float16, one unused scale a run
    assert found["memory"]["kv_cache"] == 2 * 2 * 2 * (32 * 8 * 2 + 2)
    assert found["memory"]["process_rss_peak"] >= found["memory"]["process_rss"] > 0


def test_generate_reproduces_from_the_seed_it_tells(run_module, artifact):
    options = ("--prompt", "abc", "--temperature", "2", "--top-k", "0", "--json")
    first = json.loads(run_module(GENERATE, artifact, *options).stdout)
    seed = ("--seed", str(first["seed"]))
    assert (
        json.loads(run_module(GENERATE, artifact, *options, *seed).stdout)["text"] == first["text"]
    )


BAD_GENERATE = [
    (["--prompt", ""], "prompt: it is empty"),
    (["--prompt", b"a\xff"], "prompt: it is not valid UTF-8 at character 1"),
    (["--prompt", "a" * 100], "prompt: it has 101 tokens; the context holds 64"),
    (["--prompt", "a" * 10, "--context", "8"], "prompt: it has 11 tokens; the context holds 8"),
    (["--prompt-file", "/nowhere"], "prompt-file: cannot read /nowhere: No such file"),
    (["--prompt-file", "/"], "prompt-file: cannot read /: Is a directory"),
    (["--prompt-file", "/dev/null"], "prompt: it is empty"),
    (["--prompt-file", "-"], "prompt-file: - is not valid UTF-8 at byte 1"),
    (["--prompt", "a", "-n", "0"], "max-new-tokens: asked for 0; possible: at least 1"),
    (["--prompt", "a", "-n", "-5"], "max-new-tokens: asked for -5"),
    (["--prompt", "a", "--kv-bits", "5"], "kv-bits: asked for 5"),
    (["--prompt", "a", "-t", "0"], "threads: asked for 0; possible: 1 to"),
    (["--prompt", "a", "-t", "99999999999999999999"], "threads: asked for 99999999999999999999"),
    (["--prompt", "a", "--context", "1000000"], "context: asked for 1000000; possible: 1 to 64"),
    (["--prompt", "a", "--temperature", "-1"], "temperature: asked for -1.0"),
    (["--prompt", "a", "--temperature", "nan"], "temperature: asked for nan"),
    (["--prompt", "a", "--top-p", "0"], "top-p: asked for 0.0"),
    (["--prompt", "a", "--top-p", "1.5"], "top-p: asked for 1.5"),
    (["--prompt", "a", "--top-k", "-1"], "top-k: asked for -1"),
    (["--prompt", "a", "--seed", "-1"], "seed: asked for -1"),
]
BAD_BENCH = [
    (["-p", "0", "-n", "0"], "bench: -p 0 and -n 0 leave nothing to run"),
    (["-p", "-4"], "n-prompt: asked for -4"),
    (["-n", "x"], "n-gen: asked for 'x'"),
    ([], "bench: asked for 512 tokens; possible: 1 to the context's 64"),
    (["-p", "64", "-n", "65"], "bench: asked for 65 tokens; possible: 1 to the context's 64"),
    (["-r", "0"], "repetitions: asked for 0"),
    (["-t", "1,0"], "threads: asked for 0"),
    (["--kv-bits", "8"], "kv-bits: asked for 8"),
]


MAIN = {GENERATE: generate.main, BENCH: bench.main}


def one_line(done, command: str) -> str:
    assert done.returncode == 2 and done.stdout == b"", done
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{command}: error: "), lines
    assert "; possible: " in lines[0], lines
    return lines[0]


@pytest.fixture
def run_here(capfdbinary, monkeypatch):
    """As `run_module`, in this process: a refusal needs no other."""

    def run(module: str, *arguments: str | bytes | Path, input: bytes = b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(input)))
        code = MAIN[module]([os.fsdecode(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, code, *capfdbinary.readouterr())

    return run


@pytest.mark.parametrize("options, message", BAD_GENERATE, ids=[m for _, m in BAD_GENERATE])
def test_generate_refuses(run_here, artifact, options, message):
    done = run_here(GENERATE, artifact, *options, input=b"a\xff")
    assert message in one_line(done, GENERATE)


@pytest.mark.parametrize("options, message", BAD_BENCH, ids=[m for _, m in BAD_BENCH])
def test_bench_refuses(run_here, artifact, options, message):
    assert message in one_line(run_here(BENCH, artifact, *options), BENCH)


@pytest.mark.parametrize("command", [GENERATE, BENCH])
def test_a_damaged_artifact(run_module, own_artifact, command):
    params = own_artifact / "params.bin"
    params.write_bytes(params.read_bytes()[:-1] + b"\1")
    options = ["--prompt", "a"] if command == GENERATE else []
    assert "is damaged" in one_line(run_module(command, own_artifact, *options), command)
    assert "does not exist" in one_line(run_module(command, "/nowhere", *options), command)


@pytest.mark.parametrize("options", [(), ("--prompt", "a", "-"), ("--prompt", "a", "-n", "x")])
def test_wrong_usage_exits_2(run_module, artifact, options):
    done = run_module(GENERATE, artifact, *options)
    assert "; possible: what runtime.generate --help lists" in one_line(done, GENERATE)


def test_bench_markdown(run_module, artifact):
    done = run_module(BENCH, artifact, *QUICK)
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 4 and lines[0].startswith("| model | params | target |")
    for line, name in zip(lines[2:], ("pp9", "tg5"), strict=True):
        assert re.fullmatch(rf"\| fake \| .* \| 3 \| {name} \| [\d.]+ ± [\d.]+ \|", line)
    sparsity, memory = done.stderr.decode().splitlines()
    assert sparsity == "sparsity: not recorded"
    assert re.fullmatch(r"memory: .* resident \([\d.]+\), .* at the peak \([\d.]+\); .*", memory)


def test_bench_json(run_module, artifact):
    options = ("-p", "9,17", "-n", "5", "-r", "3", "-t", "1", "--kv-bits", "16", "-o", "json")
    done = run_module(BENCH, artifact, *options)
    rows = json.loads(done.stdout)
    assert [row["test"] for row in rows] == ["pp9", "pp17", "tg5"]
    for row in rows:
        assert row["threads"] == 1 and row["kv_bits"] == 16 and row["model"] == "fake"
        assert len(row["samples"]) == 3 and row["sd"] >= 0 and row["target"] == "generic"
        assert abs(row["tokens_per_second"] - sum(row["samples"]) / 3) < 1e-6
    assert rows[0]["sparsity"] is None
    assert rows[2]["memory"]["rss_peak"] >= rows[0]["memory"]["rss_peak"] > 2**20
    assert rows[2]["sparsity"]["down_proj_by_layer"] == pytest.approx([0.5, 0.6])
    assert b"sparsity: tg5: 5.0% zeros at o_proj, 55.0% at down_proj" in done.stderr


def test_bench_csv_leaves_rows_out(run_module, artifact):
    done = run_module(BENCH, artifact, *QUICK, "-p", "0", "-o", "csv")
    (row,) = csv.DictReader(io.StringIO(done.stdout.decode()))
    assert row["test"] == "tg5" and float(row["tokens_per_second"]) > 0
    assert b"sparsity" not in run_module(BENCH, artifact, *QUICK, "-n", "0").stderr


def test_the_weights_are_in_memory_once(run_module, artifact, own_artifact):
    """A process with 96 MiB more of weights holds them mapped, and 15 % of them more at most."""
    params, tensors = own_artifact / "params.bin", own_artifact / "tensors.json"
    unused, *others = json.loads(tensors.read_text())
    unused |= {"offset": -(-params.stat().st_size // 4096) * 4096, "shape": [96 << 10, 1 << 10]}
    unused["bytes"] = 96 << 20
    tensors.write_text(json.dumps([unused, *others]))
    with params.open("r+b") as file:
        file.seek(unused["offset"])
        file.write(np.random.default_rng(0).bytes(unused["bytes"]))
    write_manifest(own_artifact, chunk_bytes=1 << 20)
    options = ("--prompt", "abc", "-n", "20", "--json", *GREEDY)
    small, large = (
        json.loads(run_module(GENERATE, path, *options).stdout)["memory"]
        for path in (artifact, own_artifact)
    )
    added = large["weights_mapped"] - small["weights_mapped"]
    assert added >= unused["bytes"]
    for held in ("process_rss", "process_rss_peak"):
        assert large[held] - small[held] <= 1.15 * added, held
    assert large["process_rss_anonymous"] - small["process_rss_anonymous"] <= 0.15 * added


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, stderr=pipe)


def test_interrupt_is_quiet(artifact):
    process = start(GENERATE, artifact, "-")  # waits for its prompt
    deadline = time.monotonic() + 60
    while b"tokenizers" not in open(f"/proc/{process.pid}/maps", "rb").read():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    asleep = 0  # half a second of it: it has imported everything, however busy the host is
    while asleep < 10:
        assert time.monotonic() < deadline
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, b"", b"")


def test_closed_pipe_is_quiet(artifact):
    process = start(GENERATE, artifact, "--prompt", "abc", *GREEDY)
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_full_disk_is_refused(artifact):
    command = [sys.executable, "-m", GENERATE, str(artifact), "--prompt", "abc", *GREEDY]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr == (
        b"runtime.generate: error: output: cannot write it: No space left on device; possible: a "
        b"file or pipe that takes it\n"
    )


def test_neither_torch_nor_the_compiler_is_loaded(artifact):
    """Read from the process's maps after a whole run; importing the package loads nothing."""
    code = f"""
import os, sys, runtime
assert not {{"tvm", "numpy", "tokenizers"}} & set(sys.modules)
runtime.Engine
assert "tvm" not in sys.modules
engine = runtime.Engine.load({str(artifact)!r})
assert "".join(engine.generate("abc", max_new_tokens=2, temperature=0)) == "de"
assert not {{"tvm", "torch", "compiler", "model", "schedules", "safetensors"}} & set(sys.modules)
assert os.environ["TVM_NUM_THREADS"] == str(engine.threads)  # TVM reads it at every launch
print(open("/proc/self/maps").read())
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TVM_")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    libraries = {line.split("/")[-1] for line in done.stdout.splitlines() if "/" in line}
    assert "libtvm_runtime.so" in libraries and "model.so" in libraries
    assert not {name for name in libraries if "tvm_compiler" in name or "torch" in name}
