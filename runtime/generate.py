"""Continue a prompt: text on stdout as it comes, speed and memory on stderr.

python -m runtime.generate dist/novels-42m-x86-avx2 --prompt "It was a dark" -n 64
python -m runtime.generate DIR --prompt-file chapter.txt --temperature 0
echo "It was a dark" | python -m runtime.generate DIR -
python -m runtime.generate DIR --prompt "It was" --json      one JSON object and no text
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import Parser
from runtime import cli, host
from runtime.engine import Engine
from runtime.errors import RuntimeRefusal
from runtime.generation import Generation


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m runtime.generate", description="Continue a prompt with a compiled model."
    )
    cli.add_engine_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 file; - is stdin")
    prompt.add_argument(
        "stdin", nargs="?", choices=["-"], metavar="-", help="read the prompt from stdin"
    )
    parser.add_argument(
        "-n", "--max-new-tokens", type=int, default=64, metavar="N",
        help="tokens to generate at most (default 64)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (default 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=40, metavar="K", help="0 keeps all (default 40)"
    )
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="P", help="1 keeps all (default 0.95)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="default: one from the system")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead")
    return parser.parse_args(argv)


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt of whichever argument has it; refuses what is not UTF-8."""
    if options.prompt is not None:
        return options.prompt
    name = options.stdin if options.prompt_file is None else options.prompt_file
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = getattr(error, "strerror", None) or error
        raise RuntimeRefusal(
            f"prompt-file: cannot read {name}: {reason}; possible: a UTF-8 file, or - for stdin"
        ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RuntimeRefusal(
            f"prompt-file: {name} is not valid UTF-8 at byte {error.start}; possible: UTF-8 text"
        ) from error


def report(engine: Engine, generation: Generation) -> dict[str, Any]:
    """Counts, tokens/s and bytes of a finished generation."""
    return {
        "model": engine.artifact.model,
        "target": engine.artifact.target,
        "threads": engine.threads,
        "kv_bits": engine.kv_bits,
        "context": engine.context,
        "seed": generation.sampler.seed,
        "finish": generation.finish,
        "prefill": {
            "tokens": len(generation.prompt),
            "tokens_per_second": cli.rate(len(generation.prompt), generation.prefill_seconds),
        },
        "decode": {
            "tokens": generation.decode_steps,
            "tokens_per_second": cli.rate(generation.decode_steps, generation.decode_seconds),
        },
        "memory": {
            "weights_mapped": engine.artifact.params_bytes,
            "kv_cache": engine.cache.nbytes(),
            **{f"process_{name}": size for name, size in host.memory().items()},
        },
    }


def show(facts: dict[str, Any]) -> str:
    """The block on stderr."""
    memory = {name: host.show_bytes(size) for name, size in facts["memory"].items()}
    lines = [
        f"model    {facts['model']} for {facts['target']}, "
        f"{facts['threads']} thread{'s' * (facts['threads'] > 1)}",
        *(
            f"{step:8} {facts[step]['tokens']} tokens, {facts[step]['tokens_per_second']:.1f} "
            "tokens/s"
            for step in ("prefill", "decode")
        ),
        f"memory   weights {memory['weights_mapped']} mapped, KV cache {memory['kv_cache']} "
        f"({facts['kv_bits']} bits, {facts['context']} tokens), process "
        f"{memory.get('process_rss', '?')}, peak {memory['process_rss_peak']}",
        f"stopped  {facts['finish']}, seed {facts['seed']}",
    ]
    return "\n".join(lines)


def generate(options: argparse.Namespace) -> None:
    prompt = read_prompt(options)
    engine = Engine.load(
        options.artifact,
        kv_bits=options.kv_bits,
        threads=options.threads,
        context=options.context,
    )
    generation = engine.generate(
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    pieces = []
    for piece in generation:
        pieces.append(piece)
        if not options.json:
            print(piece, end="", flush=True)
    facts = report(engine, generation)
    if options.json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces), **facts}))
    else:
        print(flush=True)
        print(f"\n{show(facts)}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    return cli.run("runtime.generate", lambda: generate(options))


if __name__ == "__main__":
    sys.exit(main())
