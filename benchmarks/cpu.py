"""Measure this host's CPU beside llama.cpp: whole models and single kernels, interleaved.

    python -m compiler.build --model DIR -o dist/mine
    python -m benchmarks.cpu dist/mine --peer-python VENV/bin/python -o results/
    python -m benchmarks.cpu dist/mine --only kernels --target x86-avx2 -t 2 -r 9

The peer is llama-cpp-python, built from its sdist in a Python of the user's choice (benchmarks/
llama_cpp_peer.py says what it needs); without `--peer-python` ours runs alone. Its models have the
artifact's shape, random weights in TQ2_0 and TQ1_0 and the head in Q6_K; they are written beside
the results. Its KV cache is f16 unless told otherwise, ours the artifact's: the page says which.
Engines are asked in turn (cpu_bench.py). Kernels are those of the artifact's target; without whole
models, of any target that this CPU runs. Numbers are medians, with the range; ratios are of
medians.
Writes cpu.md, cpu.json (every sample) and three plots to the output directory, the table to stdout.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from benchmarks.cpu_bench import Bench
from benchmarks.cpu_context import STEPS, measure_context
from benchmarks.cpu_kernels import measure_kernels, measure_stream
from benchmarks.cpu_model import load_models, measure_model
from benchmarks.cpu_page import plot, table
from benchmarks.cpu_peer import CACHES, FORMATS
from benchmarks.sigterm import ended_by_sigterm
from benchmarks.worker import WorkerError
from command_line import Parser, refuse
from runtime.artifact import Artifact
from runtime.errors import ArtifactError

GROUPS = ("model", "context", "kernels")
GROUPS_HELP = """groups:
  model    prompts and decode steps of whole models, at every number of threads
  context  decode steps behind longer and longer contexts, with the most threads
  kernels  each ternary shape of the model for 1, 128 and 512 tokens, down_proj by zeros,
           heads of 8, 6 and 4 bits, the launch of a parallel loop
"""


def whole_numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(
            f"asked for {text!r}; possible: whole numbers from 1 on, with commas between"
        )
    return [int(part) for part in parts]


def check_positions(options: argparse.Namespace, context: int) -> None:
    """A WorkerError where a group that was asked for needs more positions than the model has."""
    asked = {}
    if "model" in options.only:
        asked = {"--prompts": max(options.prompts), "--decode": options.decode}
    if "context" in options.only:
        asked["--repetitions"] = STEPS * (options.repetitions + 1) + 1
    for name, positions in asked.items():
        if positions > context:
            raise WorkerError(f"{name}: asked for {positions} positions; possible: 1 to {context}")


def check_kv_bits(asked: int | None, possible: Collection[int]) -> None:
    if asked is not None and asked not in possible:
        bits = ", ".join(map(str, possible))
        raise WorkerError(f"--kv-bits: asked for {asked}; possible: {bits}")


def make_writable(folder: Path) -> None:
    """A WorkerError where nothing can be written to a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WorkerError(
            f"--output: asked for {folder}, nothing can be written there: {error.strerror}; "
            "possible: a folder of yours"
        ) from error


def choose_target(asked: str | None, artifact: str, groups: Collection[str]) -> str:
    """The target whose kernels are measured, by default the artifact's; a WorkerError where this
    CPU does not run it, or where models are measured too and are for another."""
    from schedules import targets  # TVM's compiler: not before the arguments are known to be good

    name = asked or artifact
    here = targets.cpus_here()
    found = targets.find(name) if name in (*targets.TARGETS, "native") else None
    if found not in here:
        why = "this CPU does not run it" if found else "there is no such target"
        possible = ", ".join(["native", *(row.name for row in here)])
        raise WorkerError(f"target: asked for {name}, {why}; possible: {possible}")
    if found.name != artifact and {"model", "context"} & set(groups):
        raise WorkerError(
            f"target: asked for {found.name}, the artifact is for {artifact}; "
            f"possible: --only kernels, or an artifact built with --target {found.name}"
        )
    return found.name


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cpus = len(os.sched_getaffinity(0))
    parser = Parser(
        prog="python -m benchmarks.cpu",
        description=(__doc__ or "").split("\n")[0],
        epilog=GROUPS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("artifact", type=Path, help="an artifact directory of compiler.build")
    add("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP",
        help="what to measure, of the groups below (default: all)")  # fmt: skip
    add("--target", metavar="NAME", help="whose kernels (default: the artifact's)")
    add("--peer-python", metavar="PATH",
        help="a Python with llama-cpp-python, gguf and numpy (default: ours alone)")  # fmt: skip
    add("--peers", nargs="+", choices=FORMATS, default=FORMATS, metavar="FORMAT",
        help=f"the peer's formats, of {', '.join(FORMATS)} (default: both)")  # fmt: skip
    add("--peer-kv", choices=CACHES, default="f16", metavar="TYPE",
        help=f"of the peer's KV cache: {', '.join(CACHES)} (default: f16)")  # fmt: skip
    add("--kv-bits", type=int, metavar="N", help="of our KV cache (default: the artifact's)")
    add("-o", "--output", type=Path, default=Path("results"), metavar="DIR",
        help="for the table, samples, plots and the peer's models (default: results)")  # fmt: skip
    threads = sorted({1, cpus})
    add("-t", "--threads", type=whole_numbers, default=threads, metavar="N,N",
        help=f"with how many, one after another, 1 to {cpus} here "
        f"(default: {','.join(map(str, threads))})")  # fmt: skip
    add("-p", "--prompts", type=whole_numbers, default=[128, 512], metavar="N,N",
        help="tokens of the prompts of group model (default: 128,512)")  # fmt: skip
    add("-n", "--decode", type=int, default=64, metavar="N",
        help="decode steps of a sample of group model (default: 64)")  # fmt: skip
    add("-c", "--contexts", type=whole_numbers, default=[128, 512, 1024, 2048, 4096],
        metavar="N,N", help="positions of group context (default: 128,512,1024,2048,4096, "
        "the last as far as the model goes)")  # fmt: skip
    add("-r", "--repetitions", type=int, default=5, metavar="N",
        help="samples of every figure, after one that does not count (default: 5)")  # fmt: skip
    add("--commit", metavar="NAME", help="where the checkout is no repository")
    options = parser.parse_args(argv)
    if not (options.artifact / "artifact.json").is_file():
        parser.error(
            f"artifact: asked for {options.artifact}, it has no artifact.json; "
            "possible: a directory that python -m compiler.build made"
        )
    if max(options.threads) > cpus:
        parser.error(f"threads: asked for {max(options.threads)}; possible: 1 to {cpus}")
    if options.repetitions < 1 or options.decode < 1:
        parser.error("repetitions, decode: asked for less than 1; possible: 1 and more")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options, kept = parse(argv), "nothing was measured"
    try:
        artifact = Artifact.open(options.artifact, verify=False)  # another machine's is refused
        check_positions(options, artifact.context_length)
        check_kv_bits(options.kv_bits, artifact.kv_bits)
        target = choose_target(options.target, artifact.target, options.only)
        make_writable(options.output)
        with ended_by_sigterm():
            bench = Bench(options, target)
            try:
                measure_all(bench)
            finally:  # what is measured is kept, whatever ended it
                bench.close()
                if bench.rows:
                    write(bench)
                    kept = f"{options.output / 'cpu.md'} has what was measured"
    except (WorkerError, ArtifactError, OSError) as error:
        return refuse("benchmarks.cpu", error)
    except KeyboardInterrupt:
        print(f"benchmarks.cpu: interrupted; {kept}", file=sys.stderr)
        return 130
    return 0


def measure_all(bench: Bench) -> None:
    groups = bench.options.only
    measure_stream(bench)
    if "kernels" in groups:
        measure_kernels(bench)
    if {"model", "context"} & set(groups):
        load_models(bench)
    if "model" in groups:
        measure_model(bench)
    if "context" in groups:
        measure_context(bench)


def host_facts(bench: Bench) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    cache = f"ours {bench.kv_bits} bits"
    if bench.versions:
        cache += f", the peer's {bench.options.peer_kv}"
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": f"{cpu}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        "ours": f"{bench.manifest['model']} for {bench.target}",
        "commit": bench.commit,
        "peer": ", ".join(sorted(set(bench.versions.values()))) or "none",
        "KV cache": cache,
        "repetitions": bench.options.repetitions,
    }


def write(bench: Bench) -> None:
    folder = bench.options.output
    facts = host_facts(bench)
    measured = {name for row in bench.rows for name in row.samples}
    text = table(facts, [name for name in bench.engines if name in measured], bench.rows)
    (folder / "cpu.md").write_text(text, encoding="utf-8")
    found = {"host": facts, "versions": bench.versions}
    found["rows"] = [asdict(row) for row in bench.rows]
    (folder / "cpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot(bench.workers, bench.rows, folder)
    print(text, end="")


if __name__ == "__main__":
    sys.exit(main())
