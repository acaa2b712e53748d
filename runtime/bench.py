"""Measure tokens/s as llama-bench does: rows pp512, tg128; data on stdout, logs on stderr.

    python -m runtime.bench dist/novels-42m-x86-avx2 -p 512 -n 128 -t 2 -r 5 -o md
    python -m runtime.bench DIR -p 128,512 -n 0 -t 1,2 -o json

pp: a prompt of that many tokens into an empty cache, pseudo-random ids of a fixed seed. tg: that
many decode steps from <bos> on, each token drawn from the model at temperature 1 so that the
activations are those of text. On a CPU the drawing is not timed; a GPU draws, of the 40 likeliest,
and its time is in the step's, whose result is the token. Each test runs once unmeasured first.
"""

import argparse
import csv
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from command_line import Parser
from runtime import cli, host
from runtime.engine import Engine
from runtime.errors import RuntimeRefusal, require_whole
from runtime.sampler import Sampler

DEVICE_TOP_K = 40  # of a GPU's draws; it leaves all of the tokens to the host
SPARSITY_STEPS = 32  # decode steps over which the zeros are averaged
LEFT_OUT = ("samples", "sparsity", "memory")  # of CSV: they are not one number
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Row:
    """One test. Rates are tokens/s, sizes bytes; `sparsity` is None where it is not recorded."""

    test: str
    tokens_per_second: float  # mean over the repetitions
    sd: float  # sample standard deviation, 0 for one repetition
    samples: list[float]
    threads: int
    model: str
    target: str
    kv_bits: int
    context: int
    params_bytes: int
    kv_cache_bytes: int
    memory: dict[str, int]  # of the process after the test: runtime.host.memory
    sparsity: dict[str, Any] | None


def time_prompt(engine: Engine, length: int, repetition: int) -> float:
    """Seconds to prefill `length` tokens."""
    ids = np.random.default_rng(repetition).integers(0, engine.shape.vocab_size, length)
    ids[0] = engine.shape.bos_token_id
    started = time.perf_counter()
    engine.prefill(ids.tolist())
    return time.perf_counter() - started


def time_decode(engine: Engine, steps: int, repetition: int) -> tuple[float, list[int]]:
    """(seconds spent in `steps` decode steps, the tokens they were fed)."""
    top_k = DEVICE_TOP_K if engine.draws_on_device else 0
    sampler = Sampler(temperature=1.0, top_k=top_k, top_p=1.0, seed=repetition)
    tokens, seconds = [engine.shape.bos_token_id], 0.0
    for position in range(steps):
        started = time.perf_counter()
        if engine.draws_on_device:
            token = engine.decode_token(tokens[-1], 0, position, sampler)
            seconds += time.perf_counter() - started
        else:
            logits = engine.decode(tokens[-1:], [0], [position])
            seconds += time.perf_counter() - started
            token = sampler.sample(logits[0])
        tokens.append(token)
    return seconds, tokens[:-1]


def measure_sparsity(engine: Engine, tokens: Sequence[int]) -> dict[str, Any] | None:
    """Share of zeros at o_proj and down_proj while the model reads `tokens` one by one."""
    found = []
    for position, token in enumerate(tokens[:SPARSITY_STEPS]):
        shares = engine.sparsity([token], [0], [position])
        if shares is None:
            return None
        found.append(shares)
    by_layer = np.mean(found, axis=0)
    o_proj, down_proj = (by_layer[:, column].tolist() for column in (0, 1))
    return {
        "o_proj": statistics.fmean(o_proj),
        "down_proj": statistics.fmean(down_proj),
        "o_proj_by_layer": o_proj,
        "down_proj_by_layer": down_proj,
    }


def measure(engine: Engine, kind: str, size: int, repetitions: int, advance: Advance) -> Row:
    """One row: a warm-up, then the repetitions."""
    samples, sparsity = [], None
    for repetition in range(repetitions + 1):
        if kind == "pp":
            seconds = time_prompt(engine, size, repetition)
        else:
            seconds, tokens = time_decode(engine, size, repetition)
        samples.append(cli.rate(size, seconds))
        advance(size)
    memory = host.memory()  # before the zeros: they are recorded by a second set of kernels
    if kind == "tg":
        sparsity = measure_sparsity(engine, tokens)
    samples = samples[1:]
    return Row(
        test=f"{kind}{size}",
        tokens_per_second=statistics.fmean(samples),
        sd=statistics.stdev(samples) if repetitions > 1 else 0.0,
        samples=samples,
        threads=engine.threads,
        model=engine.artifact.model,
        target=engine.artifact.target,
        kv_bits=engine.kv_bits,
        context=engine.context,
        params_bytes=engine.artifact.params_bytes,
        kv_cache_bytes=engine.cache.nbytes(),
        memory=memory,
        sparsity=sparsity,
    )


def show_sparsity(row: Row) -> str:
    """One line on the zeros that the decode steps of a row met."""
    if row.sparsity is None:
        return "sparsity: not recorded"
    o_proj, down_proj = row.sparsity["o_proj"], row.sparsity["down_proj"]
    return (
        f"sparsity: {row.test}: {o_proj:.1%} zeros at o_proj, {down_proj:.1%} at down_proj, "
        "mean of the layers"
    )


def show_memory(row: Row) -> str:
    """One line on what the process holds, and held at its peak, beside what the model needs."""
    needed = row.params_bytes + row.kv_cache_bytes
    names = {"rss": "resident", "rss_peak": "at the peak"}
    held = ", ".join(
        f"{host.show_bytes(row.memory[key])} {name} ({row.memory[key] / needed:.2f})"
        for key, name in names.items()
        if key in row.memory
    )
    return f"memory: {held}; times the {host.show_bytes(needed)} of weights and KV cache"


def write(rows: Sequence[Row], output: str) -> None:
    """The rows on stdout."""
    if output == "json":
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    if output == "csv":
        names = [f.name for f in dataclasses.fields(Row) if f.name not in LEFT_OUT]
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(names)
        table.writerows([getattr(row, name) for name in names] for row in rows)
        return
    print("| model | params | target | threads | kv bits | test | t/s |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row.model} | {host.show_bytes(row.params_bytes)} | {row.target} | {row.threads} "
            f"| {row.kv_bits} | {row.test} | {row.tokens_per_second:.2f} ± {row.sd:.2f} |"
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m runtime.bench", description="Measure a compiled model's tokens/s."
    )
    cli.add_engine_arguments(parser, several_threads=True)
    parser.add_argument(
        "-p", "--n-prompt", default="512", metavar="N", help="prompt tokens; 0: none (default 512)"
    )
    parser.add_argument(
        "-n", "--n-gen", default="128", metavar="N", help="decode steps; 0: none (default 128)"
    )
    parser.add_argument(
        "-r", "--repetitions", type=int, default=5, metavar="N", help="of each test (default 5)"
    )
    parser.add_argument("-o", "--output", choices=["md", "json", "csv"], default="md")
    return parser.parse_args(argv)


def bench(options: argparse.Namespace) -> None:
    sizes = [("pp", size) for size in cli.whole_numbers("n-prompt", options.n_prompt) if size]
    sizes += [("tg", size) for size in cli.whole_numbers("n-gen", options.n_gen) if size]
    if not sizes:
        raise RuntimeRefusal("bench: -p 0 and -n 0 leave nothing to run; possible: one above 0")
    repetitions = require_whole("repetitions", options.repetitions, 1)
    cpus = host.usable_cpus()
    asked = [cpus] if options.threads is None else cli.whole_numbers("threads", options.threads)
    threads = [require_whole("threads", count, 1, cpus) for count in asked]
    engine = Engine.load(
        options.artifact, kv_bits=options.kv_bits, threads=threads[0], context=options.context
    )
    for _, size in sizes:
        if size > engine.context:
            raise RuntimeRefusal(
                f"bench: asked for {size} tokens; possible: 1 to the context's {engine.context}"
            )
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    total = sum(size for _, size in sizes) * (repetitions + 1) * len(threads)
    rows = []
    # The bar's thread would take time from the kernels: redraw seldom.
    with Progress(
        *columns, console=console, refresh_per_second=1, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        for engine.threads in threads:
            for kind, size in sizes:
                bar.update(task, description=f"{kind}{size}, {engine.threads} threads")
                rows.append(
                    measure(engine, kind, size, repetitions, lambda n: bar.advance(task, n))
                )
    write(rows, options.output)
    # Two numbers of threads meet the same zeros: say it once.
    for line in dict.fromkeys(show_sparsity(row) for row in rows if row.test.startswith("tg")):
        print(line, file=sys.stderr)
    if engine.artifact.manifest["device"] == "cpu":  # what a GPU holds, no process does
        print(show_memory(rows[-1]), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    return cli.run("runtime.bench", lambda: bench(options))


if __name__ == "__main__":
    sys.exit(main())
