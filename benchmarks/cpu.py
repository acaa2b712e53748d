"""Measure this host's CPU beside llama.cpp: whole models and single kernels, interleaved.

    python -m compiler.build --model DIR -o dist/mine
    python -m benchmarks.cpu dist/mine --peer-python VENV/bin/python -o results/
    python -m benchmarks.cpu dist/mine --only kernels --target x86-avx2 -t 2 -r 9

The peer is llama-cpp-python, built from its sdist in a Python of the user's choice (benchmarks/
llama_cpp_peer.py says what it needs); without `--peer-python` ours runs alone. Its models have the
artifact's shape, random weights in TQ2_0 and TQ1_0 and the head in Q6_K; they are written beside
the results. Engines are asked in turn (cpu_bench.py). Kernels are those of the artifact's target;
without whole models, of any target that this CPU runs. Numbers are medians, with the range; ratios
are of medians.
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
from typing import Any

from benchmarks.cpu_bench import Bench
from benchmarks.cpu_context import DECODE_STEPS, measure_context
from benchmarks.cpu_kernels import measure_kernels, measure_stream
from benchmarks.cpu_model import load_models, measure_model
from benchmarks.cpu_page import plot, table
from benchmarks.worker import WorkerError
from command_line import Parser
from runtime.artifact import Artifact
from runtime.errors import ArtifactError

PEERS = ("TQ2_0", "TQ1_0")  # llama.cpp's ternary formats
GROUPS = ("model", "context", "kernels")


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
        asked["--repetitions"] = DECODE_STEPS * (options.repetitions + 1) + 1
    for name, positions in asked.items():
        if positions > context:
            raise WorkerError(f"{name}: asked for {positions} positions; possible: 1 to {context}")


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
    parser = Parser(prog="python -m benchmarks.cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path, help="an artifact directory of compiler.build")
    parser.add_argument("--target", metavar="NAME", help="of kernels; default: the artifact's")
    parser.add_argument("--peer-python", metavar="PATH", help="a Python with llama-cpp-python")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, metavar="FORMAT")
    parser.add_argument("-o", "--output", type=Path, default=Path("results"), metavar="DIR")
    parser.add_argument(
        "-t", "--threads", type=whole_numbers, default=sorted({1, cpus}), metavar="N,N"
    )
    parser.add_argument("-p", "--prompts", type=whole_numbers, default=[128, 512], metavar="N,N")
    parser.add_argument("-n", "--decode", type=int, default=64, metavar="N", help="steps a sample")
    parser.add_argument(
        "-c", "--contexts", type=whole_numbers, default=[128, 512, 1024, 2048, 4096], metavar="N,N"
    )
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP")
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
    options = parse(argv)
    try:
        artifact = Artifact.open(options.artifact, verify=False)  # another machine's is refused
        check_positions(options, artifact.context_length)
        target = choose_target(options.target, artifact.target, options.only)
        options.output.mkdir(parents=True, exist_ok=True)
        bench = Bench(options, target)
        try:
            measure_all(bench)
        finally:  # what is measured is kept, whatever ended it
            bench.close()
            if bench.rows:
                write(bench)
    except (WorkerError, ArtifactError, OSError) as error:
        print(f"benchmarks.cpu: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks.cpu: interrupted; what was measured is kept", file=sys.stderr)
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
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": f"{cpu}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        "ours": f"{bench.manifest['model']} for {bench.target}",
        "peer": ", ".join(sorted(set(bench.versions.values()))) or "none",
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
