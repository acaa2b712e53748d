"""Measure this host's CPU beside llama.cpp: whole models and single kernels, interleaved.

    python -m compiler.build --model DIR -o dist/mine
    python -m benchmarks.cpu dist/mine --peer-python VENV/bin/python -o results/
    python -m benchmarks.cpu dist/mine --only kernels -t 2 -r 9

The peer is llama-cpp-python, built from its sdist in a Python of the user's choice (benchmarks/
llama_cpp_peer.py says what it needs); without `--peer-python` ours runs alone. Its models have the
artifact's shape, random weights in TQ2_0 and TQ1_0 and the head in Q6_K; they are written beside
the results. Each engine is a process of its own; each repetition asks every engine once, in turn,
so that a noisy spell meets all of them; so does a streaming read of memory, which shares refer to.
Numbers are medians, with the range; ratios are of medians.
Writes cpu.md, cpu.json (every sample) and three plots to the output directory, the table to stdout.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cpu_page import OURS, Row, plot, show_row, table
from benchmarks.worker import Worker, WorkerError
from command_line import Parser
from runtime.artifact import Artifact
from runtime.errors import ArtifactError

HERE = Path(__file__).resolve().parent
PEERS = ("TQ2_0", "TQ1_0")  # llama.cpp's ternary formats
READ, DENSE = "read", "our dense"  # processes of their own: a streaming read, a dense kernel
STREAM_BYTES = 1 << 29
COLD_BYTES = 300e6  # that the copies of a kernel's weights take: past every cache
MOST_COPIES = 1000  # a graph of ggml holds 2048 nodes
GEMM_TOKENS = (128, 512)
HEAD_BITS = (8, 6, 4)
ZEROS = (0.5, 0.84, 0.92)  # at down_proj: half, the paper's 7B, the shipped model's
LAUNCHES = 2000
DECODE_STEPS = 16
GROUPS = ("model", "context", "kernels")


class Bench:
    """The workers and what has been measured."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[Row] = []
        self.reader = Worker(READ, sys.executable, HERE / "cpu_worker.py")
        self.reader.ask("prepare", kind="stream", nbytes=STREAM_BYTES)
        self.dense = Worker(DENSE, sys.executable, HERE / "cpu_worker.py")
        self.workers = {OURS: Worker(OURS, sys.executable, HERE / "cpu_worker.py")}
        if options.peer_python:
            for kind in options.peers:
                script = HERE / "llama_cpp_peer.py"
                self.workers[kind] = Worker(kind, options.peer_python, script)
        self.shape = json.loads((options.artifact / "config.json").read_text(encoding="utf-8"))
        self.manifest = json.loads((options.artifact / "artifact.json").read_text(encoding="utf-8"))
        self.versions = {name: self.version(name) for name in self.workers if name != OURS}

    def close(self) -> None:
        for worker in (self.reader, self.dense, *self.workers.values()):
            worker.close()

    def version(self, peer: str) -> str:
        try:
            return self.workers[peer].ask("hello")["version"]
        except WorkerError as error:
            raise WorkerError(
                f"{error}: {self.options.peer_python} said why above; possible: --peer-python "
                "with a Python that has llama-cpp-python, gguf and numpy"
            ) from error

    def worker(self, name: str) -> Worker:
        return self.dense if name == DENSE else self.workers[name]

    @property
    def engines(self) -> list[str]:
        return [*self.workers, DENSE]

    def measure(
        self,
        group: str,
        test: str,
        threads: int,
        amount: float,
        unit: str,
        ask: dict[str, Callable[[Worker], float]],
        floor: dict[str, float],
    ) -> None:
        """A row: each engine of `ask`, one repetition of all after another, the first thrown
        away. Where bytes bound it, every repetition begins with a streaming read."""
        samples: dict[str, list[float]] = {name: [] for name in ask}
        reads = []
        for repetition in range(self.options.repetitions + 1):
            if floor:
                reads.append(self.reader.ask("kernel", threads=threads)["seconds"])
            for name, seconds in ask.items():
                found = seconds(self.worker(name))
                if repetition:
                    samples[name].append(found)
        bandwidth = STREAM_BYTES / statistics.median(reads[1:]) if reads else 0
        row = Row(group, test, threads, amount, unit, samples, floor, bandwidth)
        self.rows.append(row)
        print(show_row(self.engines, row), file=sys.stderr)

    def kernel(
        self, test: str, amount: float, unit: str, ask: dict[str, dict], share: float = 0
    ) -> None:
        """Prepared kernels of the engines in `ask`, at every number of threads; of its weights
        ours needs `share`, 0 where something else bounds it."""
        nbytes = {
            name: self.worker(name).ask("prepare", **r).get("bytes") for name, r in ask.items()
        }
        floor = {OURS: nbytes[OURS] * share} if share else {}
        for threads in self.options.threads:
            calls = dict.fromkeys(
                ask, lambda worker, t=threads: worker.ask("kernel", threads=t)["seconds"]
            )
            self.measure("kernels", test, threads, amount, unit, calls, floor)


def measure_stream(bench: Bench) -> None:
    ask = {OURS: {"kind": "stream", "nbytes": STREAM_BYTES}}
    bench.kernel("streaming read", STREAM_BYTES / 1e9, "GB", ask, share=1)


def cold_copies(nbytes: float) -> int:
    return min(MOST_COPIES, max(2, int(COLD_BYTES / nbytes)))


def measure_kernels(bench: Bench) -> None:
    hidden, glu = bench.shape["hidden_size"], bench.shape["intermediate_size"]
    size = bench.shape["head_dim"]
    kv = bench.shape["num_key_value_heads"] * size
    peers = [name for name in bench.workers if name != OURS]
    for n, k in dict.fromkeys([(hidden, hidden), (kv, hidden), (glu, hidden), (hidden, glu)]):
        for m in (1, *GEMM_TOKENS):
            copies = cold_copies(n * k / 4) if m == 1 else 2
            for act_bits in (4, 8):
                ask = {
                    OURS: {"kind": "matmul", "act_bits": act_bits},
                    **{name: {"kind": name} for name in peers},
                }
                ask = {
                    name: r | {"n": n, "k": k, "m": m, "copies": copies} for name, r in ask.items()
                }
                test = f"{n}x{k}, {m} token{'s' * (m > 1)}, INT{act_bits}"
                bench.kernel(test, 2e-9 * n * k * m, "G op", ask, share=m == 1)
    copies = cold_copies(glu * hidden / 4)
    for zeros in ZEROS:
        sizes = {"n": hidden, "k": glu, "m": 1, "copies": copies}
        ask = {
            OURS: {"kind": "sparse", "zeros": zeros, **sizes},
            DENSE: {"kind": "matmul", "act_bits": 8, **sizes},
        }
        bench.kernel(f"down_proj, {zeros:.0%} zeros", 1e-6, "M call", ask, share=1 - zeros)
    sizes = {"n": bench.shape["vocab_size"], "k": hidden, "m": 1, "copies": 2}
    for bits in HEAD_BITS:
        ask = {OURS: {"kind": "head", "bits": bits, **sizes}}
        bench.kernel(f"head, {bits} bits", 1e-6, "M call", ask, share=1)
    for ours in (True, False):
        ask = {OURS: {"kind": "launch", "is_launched_by_us": ours, "copies": LAUNCHES}}
        name = "launch" if ours else "launch by TVM's pool"
        bench.kernel(name, 1e-6, "M call", ask)


def load_models(bench: Bench) -> None:
    context = bench.manifest["context_length"]
    threads = bench.options.threads[0]
    for name, worker in bench.workers.items():
        path = bench.options.artifact
        if name != OURS:
            path = bench.options.output / f"random-{name}.gguf"
            if not path.exists():
                worker.ask("write_model", path=str(path), kind=name, shape=bench.shape)
        worker.ask("load", path=str(path), context=context, threads=threads)


def token_bytes(bench: Bench) -> dict[str, float]:
    """Bytes of weights that a decoded token needs: ours by the zeros it met, the peer's all.

    A row of up_proj whose product is zero at down_proj is not needed either.
    """
    zeros = bench.workers[OURS].ask("zeros")["zeros"] or (0, 0)
    share = {"o.w": 1 - zeros[0], "up.w": 1 - zeros[1], "down.w": 1 - zeros[1]}
    tied = bench.shape["tie_word_embeddings"]
    total = 0.0
    for tensor in bench.manifest["tensors"]:
        name = tensor["name"]
        if name.startswith(("rope.", "embed.")) and not (tied and name.startswith("embed.")):
            continue
        total += tensor["bytes"] * share.get(name.split(".", 2)[-1], 1)
    files = {
        name: (bench.options.output / f"random-{name}.gguf").stat().st_size
        for name in bench.workers
        if name != OURS
    }
    return {OURS: total, **files}


def measure_model(bench: Bench) -> None:
    needed = token_bytes(bench)
    steps = bench.options.decode

    def decode(worker: Worker) -> float:
        worker.ask("clear")
        return worker.ask("decode", steps=steps)["seconds"]

    for threads in bench.options.threads:
        for worker in bench.workers.values():
            worker.ask("threads", count=threads)
        for tokens in bench.options.prompts:
            ask = dict.fromkeys(
                bench.workers, lambda worker, n=tokens: worker.ask("prompt", tokens=n)["seconds"]
            )
            bench.measure("model", f"pp{tokens}", threads, tokens, "token", ask, {})
        floor = {name: size * steps for name, size in needed.items()}
        ask = dict.fromkeys(bench.workers, decode)
        bench.measure("model", f"tg{steps}", threads, steps, "token", ask, floor)


def measure_context(bench: Bench) -> None:
    """Decode steps behind longer and longer contexts, with the most threads."""
    threads = max(bench.options.threads)
    for worker in bench.workers.values():
        worker.ask("threads", count=threads)
        worker.ask("clear")
    most = bench.manifest["context_length"] - DECODE_STEPS * (bench.options.repetitions + 1)
    for position in sorted({min(p, most) for p in bench.options.contexts}):
        for worker in bench.workers.values():
            worker.ask("fill", position=position)
        ask = dict.fromkeys(
            bench.workers, lambda worker: worker.ask("decode", steps=DECODE_STEPS)["seconds"]
        )
        bench.measure("context", f"tg at {position}", threads, DECODE_STEPS, "token", ask, {})


def host_facts(bench: Bench) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": f"{cpu}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
        "ours": f"{bench.manifest['model']} for {bench.manifest['target']}",
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    cpus = len(os.sched_getaffinity(0))
    parser = Parser(prog="python -m benchmarks.cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path, help="an artifact directory of compiler.build")
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
        options.output.mkdir(parents=True, exist_ok=True)
        bench = Bench(options)
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


if __name__ == "__main__":
    sys.exit(main())
