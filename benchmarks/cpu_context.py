"""Group `context` of benchmarks/cpu.py: decode steps behind longer and longer contexts."""

from benchmarks.cpu_bench import Bench

STEPS = 16  # a sample


def measure_context(bench: Bench) -> None:
    """With the most threads."""
    threads = max(bench.options.threads)
    for worker in bench.workers.values():
        worker.ask("threads", count=threads)
        worker.ask("clear")
    most = bench.manifest["context_length"] - STEPS * (bench.options.repetitions + 1)
    for position in sorted({min(p, most) for p in bench.options.contexts}):
        for worker in bench.workers.values():
            worker.ask("fill", position=position)
        ask = dict.fromkeys(
            bench.workers, lambda worker: worker.ask("decode", steps=STEPS)["seconds"]
        )
        bench.measure("context", f"tg at {position}", threads, STEPS, "token", ask, {})
