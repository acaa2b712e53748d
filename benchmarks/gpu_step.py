"""GPU time of a built model's decode step, whole and by launch, from CUPTI by torch.profiler.

    python -m benchmarks.gpu_step dist/random-2b-cuda-sm90 -c 512

A step is the span from its first kernel's start to its last one's end, so that what the host does
between steps (it takes the logits) is not in it. Launches overlap (LaunchEarly): a launch is
charged from the end of the one before it in the order of their ends, and the charges add up to the
span. Beside it a token as `runtime.generate` has it: the host's wall time, draw included.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from command_line import Parser
from runtime import cli
from runtime.artifact import Artifact
from runtime.engine import Engine
from runtime.errors import RuntimeRefusal, require_whole
from runtime.sampler import Sampler

WARM, STEPS = 8, 40
TOP_K = 40
PAUSE = 5e-4  # seconds between steps: one is told from the next by its silence
SILENCE = 100  # us


@dataclass(frozen=True)
class Launch:
    name: str
    start: float  # us
    end: float


def split(launches: Sequence[Launch]) -> list[list[Launch]]:
    """Steps: launches in the order of their starts, parted by SILENCE."""
    steps: list[list[Launch]] = []
    end = float("-inf")
    for launch in sorted(launches, key=lambda launch: launch.start):
        if launch.start - end > SILENCE:
            steps.append([])
        steps[-1].append(launch)
        end = max(end, launch.end)
    return steps


def summarize(launches: Sequence[Launch]) -> dict[str, Any]:
    """Of the steps with as many launches as most have: a profile's first one may be cut."""
    steps = split(launches)
    count = statistics.mode(len(step) for step in steps)
    steps = [step for step in steps if len(step) == count]
    spans = [max(x.end for x in step) - step[0].start for step in steps]
    charged: dict[str, list[float]] = defaultdict(list)
    for step in steps:
        end = step[0].start
        for launch in sorted(step, key=lambda launch: launch.end):
            charged[launch.name].append(launch.end - end)
            end = launch.end
    kinds = [
        {
            "name": name,
            "a_step": len(us) // len(steps),
            "us_a_step": sum(us) / len(steps),
        }
        for name, us in sorted(charged.items(), key=lambda item: -sum(item[1]))
    ]
    return {
        "us": statistics.median(spans),
        "range_us": [min(spans), max(spans)],
        "steps": len(steps),
        "launches": count,
        "kinds": kinds,
    }


def open_engine(directory: Path) -> Engine:
    """At the artifact's context. Raises `RuntimeRefusal`, too, where it or PyTorch is no GPU's."""
    if not torch.cuda.is_available():
        raise RuntimeRefusal("needs a GPU that PyTorch can use, found none; possible: such a host")
    open_artifact(directory, "cuda")
    return Engine.load(directory)


def open_artifact(directory: Path, target: str) -> Artifact:
    """Raises `RuntimeRefusal` where its target's name begins otherwise."""
    artifact = Artifact.open(directory)
    if not artifact.target.startswith(target):
        raise RuntimeRefusal(
            f"artifact {directory}: is for {artifact.target}; possible: one for {target}"
        )
    return artifact


def measure(engine: Engine, context: int) -> dict[str, Any]:
    """STEPS decode steps, batch 1, behind `context` random tokens; shown as they are there."""
    ids = np.random.default_rng(0).integers(0, engine.shape.vocab_size, context).tolist()
    engine.prefill(ids)
    token = ids[0]
    for i in range(WARM):
        engine.decode([token], [0], [context + i])
    tokens = time_tokens(engine, token, context)  # CUPTI, once loaded, stays for all that follows
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for i in range(STEPS):
            engine.decode([token], [0], [context + WARM + i])
            torch.cuda.synchronize()
            time.sleep(PAUSE)
    launches = [
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in profiled.events() or ()
        if event.device_type == torch.autograd.DeviceType.CUDA and "Mem" not in event.name
    ]
    found = {"context": context, "token": tokens, **summarize(launches)}
    show(found)
    return found


def time_tokens(engine: Engine, token: int, context: int) -> dict[str, Any]:
    """Of `Engine.decode_token`: a token in, the one drawn after it out, of the TOP_K likeliest."""
    sampler, times = Sampler(temperature=1.0, top_k=TOP_K, top_p=1.0, seed=0), []
    for i in range(WARM + STEPS):
        started = time.perf_counter()
        token = engine.decode_token(token, 0, context + i, sampler)
        times.append((time.perf_counter() - started) * 1e6)
    times = times[WARM:]
    return {"us": statistics.median(times), "range_us": [min(times), max(times)]}


def show(step: dict[str, Any]) -> None:
    low, high = step["range_us"]
    print(
        f"step at {step['context']}: {step['us']:.1f} us ({low:.1f}-{high:.1f}, "
        f"{step['steps']} steps), {step['launches']} launches"
    )
    token, (low, high) = step["token"], step["token"]["range_us"]
    print(f"token in to token out, on the host: {token['us']:.1f} us ({low:.1f}-{high:.1f})")
    for kind in step["kinds"]:
        us = kind["us_a_step"] / kind["a_step"]
        print(f"  {kind['a_step']:4} x {us:7.2f} us = {kind['us_a_step']:7.1f} us  {kind['name']}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m benchmarks.gpu_step", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("artifact", type=Path, help="of compiler.build, for this GPU")
    parser.add_argument("-c", "--context", type=int, default=512, metavar="N",
                        help="tokens before the steps (default: 512)")  # fmt: skip
    args = parser.parse_args(argv)

    def body() -> None:
        engine = open_engine(args.artifact)
        require_whole("context", args.context, 1, engine.artifact.context_length - WARM - STEPS)
        measure(engine, args.context)

    return cli.run(parser.command, body)


if __name__ == "__main__":
    raise SystemExit(main())
