"""Greedy tokens of an artifact, and a digest of every logit on the way, one JSON object a line.

    python tests/release/greedy.py ARTIFACT 48

Imports the runtime alone; two machines that print the same lines compute the same bits.
"""

import hashlib
import json
import platform
import sys

import numpy as np

from runtime import Engine

PROMPT = "It was a dark evening, and the old house"


def greedy(directory: str, count: int, kv_bits: int) -> dict[str, object]:
    engine = Engine.load(directory, kv_bits=kv_bits)
    prompt, digest = engine.encode(PROMPT), hashlib.sha256()
    logits, tokens = np.array(engine.prefill(prompt)), []
    for position in range(len(prompt), len(prompt) + count):
        digest.update(logits.tobytes())
        tokens.append(int(logits.argmax()))
        logits = np.array(engine.decode([tokens[-1]], [0], [position])[0])
    return {"kv_bits": kv_bits, "tokens": tokens, "logits_sha256": digest.hexdigest()}


def main() -> None:
    directory, count = sys.argv[1], int(sys.argv[2])
    print(f"greedy: {platform.machine()}, {directory}", file=sys.stderr)
    for kv_bits in (3, 16):
        print(json.dumps(greedy(directory, count, kv_bits)))


if __name__ == "__main__":
    main()
