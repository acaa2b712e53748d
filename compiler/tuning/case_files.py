"""Case files: the arguments and weights of a task, on the disk as worker.py reads them."""

from pathlib import Path

import numpy as np

from compiler.tuning import inputs
from compiler.tuning.candidates import UNPACKED, Candidate
from compiler.tuning.tasks import Task


def make_files(task: Task, folder: Path, weigh: str, cold_bytes: int) -> dict:
    """Cases at the rows that are timed, and at those that are only checked, for worker.py."""
    rng = np.random.default_rng(0)
    w = inputs.make_weights(task.op.name, task.sizes, rng)
    np.save(folder / "w.npy", w)
    cases = {}
    for rows in [*task.rows(weigh), inputs.CHECK_ROWS]:
        cases[rows] = folder / f"rows{rows}.npz"
        case = inputs.make_case(task.op.name, task.sizes, rows, task.active, w, rng)
        inputs.save_case(cases[rows], case)
    return {"cases": cases, "weights": {}, "cold_bytes": cold_bytes, "unpacked": folder / "w.npy"}


def add_weights(files: dict, candidate: Candidate) -> bool:
    """Pack the weights as a candidate reads them; whether that was new."""
    if candidate.layout in files["weights"]:
        return False
    path = files["unpacked"].with_name(f"{candidate.layout}.npy")
    layout = None if candidate.layout == UNPACKED else candidate.layout
    inputs.save_weights(path, np.load(files["unpacked"]), layout)
    files["weights"][candidate.layout] = path
    return True
