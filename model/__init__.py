"""The PyTorch reference: quantizers, integer ops, training, checkpoints."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None and sys.argv[0] == "-m":  # python -m model.<command>
    print(
        "model: torch is missing; possible: pip install 'bitnet-compiler[export]'", file=sys.stderr
    )
    raise SystemExit(2)
