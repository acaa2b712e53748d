"""Prompts of a built model beside a bf16 model of the same shapes in PyTorch, on one GPU.

    python -m benchmarks.gpu_prefill dist/random-2b-cuda-sm90 -p 512,2048 -r 7

The peer: dense bf16 linear layers, SDPA, the same norms, torch.compile, its whole prompt one CUDA
graph; random weights; logits of the last token. Ours: `Engine.prefill`, tokens in, logits on the
host. Wall time, interleaved, medians; needs a PyTorch with CUDA.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.gpu_step import open_engine
from command_line import Parser
from runtime import cli
from runtime.engine import Engine
from runtime.errors import require_whole

EPS = 1e-5
Weights = tuple[torch.Tensor, ...]


@dataclass
class Prompt:
    """A captured prompt: reads and writes at the addresses of its inputs and logits."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[torch.Tensor, ...]  # held: freed, their memory would be another's
    logits: torch.Tensor

    def __call__(self) -> None:
        self.graph.replay()
        self.logits.float().cpu()


class Peer:
    """A decoder of the shapes in config.json, bf16."""

    def __init__(self, config: dict):
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.dim = config.get("head_dim") or self.hidden // self.heads
        width, attended = (self.heads + 2 * self.kv_heads) * self.dim, self.heads * self.dim
        shapes = (
            *((self.hidden,), (width, self.hidden), (attended,), (self.hidden, attended)),
            *((self.hidden,), (2 * inner, self.hidden), (inner,), (self.hidden, inner)),
        )
        layers = range(config["num_hidden_layers"])
        self.layers = [tuple(weight(*shape) for shape in shapes) for _ in layers]
        self.table = weight(config["vocab_size"], self.hidden)
        self.layer = torch.compile(self._layer)

    def _layer(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weights: Weights):
        norm1, qkv, norm2, o, norm3, gate_up, norm4, down = weights
        m, total = x.shape[0], self.heads + 2 * self.kv_heads
        heads = F.linear(F.rms_norm(x, norm1.shape, norm1, EPS), qkv).view(m, total, self.dim)
        low, high = heads[:, : self.heads + self.kv_heads].chunk(2, -1)
        turned = torch.cat((low * cos - high * sin, high * cos + low * sin), -1)
        q, k = turned.split((self.heads, self.kv_heads), 1)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, heads[:, -self.kv_heads :]))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = y[0].transpose(0, 1).reshape(m, -1)
        x = x + F.linear(F.rms_norm(y, norm2.shape, norm2, EPS), o)
        gate, up = F.linear(F.rms_norm(x, norm3.shape, norm3, EPS), gate_up).chunk(2, -1)
        h = F.relu(gate).square() * up
        return x + F.linear(F.rms_norm(h, norm4.shape, norm4, EPS), down)

    def _forward(self, tokens: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        x = F.embedding(tokens, self.table)
        for weights in self.layers:
            x = self.layer(x, cos, sin, weights)
        return F.linear(x[-1:], self.table)

    @torch.inference_mode()
    def prompt(self, length: int) -> Prompt:
        """A call that runs a prompt of this length to its end."""
        tokens = torch.randint(0, self.table.shape[0], (length,), device="cuda")
        angle = torch.rand(length, 1, self.dim // 2, device="cuda")
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        for _ in range(2):
            self._forward(tokens, cos, sin)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward(tokens, cos, sin)
        return Prompt(graph, (tokens, cos, sin), logits)


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(engine: Engine, peer: Peer, length: int, repetitions: int) -> dict[str, float]:
    vocab = engine.shape.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, length).tolist()
    calls = {"ours": lambda: engine.prefill(ids), "bf16": peer.prompt(length)}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            taken = seconds(call)
            if repetition:
                times[name].append(taken)
    ours, bf16 = (statistics.median(times[name]) * 1e3 for name in calls)
    return {"prompt": length, "ours_ms": ours, "bf16_ms": bf16, "ratio": bf16 / ours}


def compare(engine: Engine, lengths: Sequence[int], repetitions: int) -> list[dict[str, float]]:
    """A row a length, shown as it is there."""
    peer = Peer(json.loads((engine.artifact.path / "config.json").read_text(encoding="utf-8")))
    rows = []
    for length in lengths:
        rows.append(measure(engine, peer, length, repetitions))
        text = "pp{prompt}: ours {ours_ms:.2f} ms, bf16 {bf16_ms:.2f} ms: {ratio:.2f} times"
        print(text.format(**rows[-1]), flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmarks.gpu_prefill", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("artifact", type=Path, help="of compiler.build, for this GPU")
    parser.add_argument("-p", "--n-prompt", default="2048", metavar="N",
                        help="lengths, by commas (default: 2048)")  # fmt: skip
    parser.add_argument("-r", "--repetitions", type=int, default=7, metavar="N",
                        help="samples after one that does not count (default: 7)")  # fmt: skip
    args = parser.parse_args(argv)

    def body() -> None:
        repetitions = require_whole("repetitions", args.repetitions, 1)
        lengths = cli.whole_numbers("n-prompt", args.n_prompt)
        engine = open_engine(args.artifact)
        for length in lengths:
            require_whole("n-prompt", length, 1, engine.artifact.context_length)
        compare(engine, lengths, repetitions)

    return cli.run(parser.command, body)


if __name__ == "__main__":
    raise SystemExit(main())
