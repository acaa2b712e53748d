"""Baseline: TVM's own default for a plain int8 matmul of the same shape.

    out[i, j] = sum_k int32(x[i, k]) * int32(w[j, k])        weights a byte each, no epilogue

Scheduled by dlight's default rule for the target where one applies (a CPU has one for M = 1), else
the loops as te.compute makes them, which LLVM vectorises.
"""

from pathlib import Path

import numpy as np
import torch
import tvm
from tvm import te
from tvm.s_tir import dlight

from compiler.pipeline import compile_library
from compiler.tuning import inputs
from compiler.tuning.candidates import UNPACKED
from compiler.tuning.tasks import Task
from compiler.tuning.worker import ENTRY
from model import grouped
from schedules.targets import GpuTarget


def matmul(m: int, n: int, k: int) -> tvm.tirx.PrimFunc:
    x = te.placeholder((m, k), "int8", name="x")
    w = te.placeholder((n, k), "int8", name="w")
    r = te.reduce_axis((0, k), "k")

    def element(i, j):
        return te.sum(x[i, r].astype("int32") * w[j, r].astype("int32"), axis=r)

    out = te.compute((m, n), element, name="out")
    return te.create_prim_func([x, w, out]).with_attr("global_symbol", ENTRY)


def build(task: Task, rows: int, path: Path, linker: str) -> None:
    gpu = dlight.gpu
    rules = (
        (gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback())
        if isinstance(task.target, GpuTarget)
        else (dlight.cpu.GEMV(),)
    )
    module = tvm.IRModule({ENTRY: matmul(rows, int(task.sizes["N"]), int(task.sizes["K"]))})
    with task.target.to_tvm():
        scheduled = dlight.ApplyDefaultSchedule(*rules)(module)
        compile_library(scheduled, task.target, path, linker)


def make_files(task: Task, files: dict, folder: Path) -> dict:
    """The cases of a task for this kernel: its q alone, and the int32 sums."""
    path, cases = plain_weights(task, files["unpacked"], folder), {}
    w = np.load(path)
    for rows, case in files["cases"].items():
        with np.load(case) as arrays:
            q = arrays["before0"]
        slices = [
            q.astype(np.float64) @ w[i : i + inputs.SLICE].T.astype(np.float64)
            for i in range(0, len(w), inputs.SLICE)
        ]
        expected = np.concatenate(slices, axis=1).astype(np.int32)
        cases[rows] = folder / f"plain{rows}.npz"
        inputs.save_case(cases[rows], inputs.Case([q], [], expected))
    return files | {"cases": cases, "weights": {UNPACKED: path}}


def plain_weights(task: Task, path: Path, folder: Path) -> Path:
    """int8[N, K], the codes of a table in groups"""
    if "bits" not in task.sizes:
        return path
    packed, (k, bits) = torch.from_numpy(np.load(path)), (task.sizes[s] for s in ("K", "bits"))
    np.save(folder / "codes.npy", grouped.unpack(packed, int(k), int(bits))[0].numpy())
    return folder / "codes.npy"
