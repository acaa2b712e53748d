"""Group `model` of benchmarks/cpu.py: prompts and decode steps of whole models."""

from benchmarks import cpu_peer
from benchmarks.cpu_bench import Bench
from benchmarks.cpu_page import OURS
from benchmarks.worker import Worker


def load_models(bench: Bench) -> None:
    context = bench.manifest["context_length"]
    threads = bench.options.threads[0]
    sizes = {"context": context, "threads": threads}
    for name, worker in bench.workers.items():
        if name == OURS:
            path = str(bench.options.artifact)
            worker.ask("load", path=path, kv_bits=bench.kv_bits, **sizes)
        else:
            file = cpu_peer.written(worker, bench.options.output, name, bench.shape)
            cpu_peer.load(worker, file, cache=bench.options.peer_kv, **sizes)


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
        name: cpu_peer.model_file(bench.options.output, name, bench.shape).stat().st_size
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
