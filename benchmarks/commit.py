"""The commit that a benchmark's figures are of."""

import subprocess
from pathlib import Path


def commit() -> str:
    """Of the checkout that this file is in, with what is not committed told."""
    folder = str(Path(__file__).resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return found.stdout.strip() or "unknown"
