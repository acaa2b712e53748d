"""CUDA kernels on a machine without a GPU: they compile for every row, and change only knowingly.

    python -m tests.schedules.test_cuda       writes golden/cuda.txt anew

The golden file has a line for each launch: threads, the PTX it asks for by name and how often, and
a hash of its CUDA source. A GPU runs the kernels by the ops' own tests.

Kernels that are launched early wait for what the launch before them writes; nvcc may take a load
of const data over that wait, so the machine code is looked at, too.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import tvm
from tvm_ffi import structural_equal

from benchmarks import gpu_checks
from compiler import nvcc
from compiler.kernels import Schedule, default_choice, families_of, using
from compiler.passes.launch_early import launch_early
from schedules.intrin.cuda import WAITS_ITSELF
from schedules.targets import TARGETS, GpuTarget, capability_of

GOLDEN = Path(__file__).parent / "golden" / "cuda.txt"
HEADS = (4, 2, 64)
# folder, arguments before the target, those after it: every form of every op, small
KERNELS = (
    ("embedding", (300, 128), ()),
    ("rms_norm", (None, 160, 1e-5), ()),
    ("rms_norm", ("int4", 160, 1e-5), ()),
    ("rms_norm", ("int8", 2560, 1e-5), ()),
    ("rms_norm", ("fp4", 17, 1e-5), ()),
    ("rms_norm_topk", (2560, 1280, 1e-5), ()),
    ("rms_norm_topk", (30000, 1280, 1e-5), ()),
    ("rms_norm_topk", (2560, 1280, 1e-5), (False,)),
    ("ternary_matmul", (640, 4608, 4), ("scale",)),
    ("ternary_matmul", (130, 272, 8), ("glu",)),
    ("ternary_matmul", (130, 257, 8), ("glu",)),
    ("ternary_matmul", (130, 272, 8), ("residual",)),
    ("ternary_matmul", (132, 272, 8), ("residual",)),  # which Hopper's stages hold
    ("sparse_ternary_matmul", (130, 257), ()),
    ("int8_matmul", (65, 64), ()),
    ("int8_matmul", (65, 33), ()),
    ("float_matmul", (65, 33), ()),
    ("request", (), ()),
    ("sample", (300,), ()),
    ("rope", (*HEADS, 64), ()),
    *(("kv_append", (*HEADS, bits), ()) for bits in (16, 4, 3)),
    *(("attention", (*HEADS, bits), ()) for bits in (16, 4, 3)),
    ("attention", (4, 2, 40, 3), ()),
    *(("attention", (8, 2, 128, bits), ()) for bits in (4, 3)),
    # Of one family
    ("glu_matmul", (130, 272), ()),
    ("rope_matmul", (*HEADS, 64, 272), ()),
    *(("norm_matmul", (130, 260, "int4", 1e-5), (end,)) for end in ("scale", "residual", "glu")),
    ("norm_matmul", (130, 260, "int8", 1e-5), ("residual", 130)),
    *(("rope_attention", (*HEADS, 64, bits), ()) for bits in (4, 3)),
    ("ternary_matmul", (8464, 260, 4), ("scale",)),
)
CUDA_TOOLS = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")  # of the wheels of `dev`
WAIT = "ACQBULK"  # griddepcontrol.wait in machine code
LOAD = re.compile(r"\b(LDG|LD|LDGSTS|UBLKCP|UTMALDG)\b")  # from global memory
GPU_ROWS = [row for row in TARGETS.values() if isinstance(row, GpuTarget)]


def label(folder: str, args: tuple, end: tuple) -> str:
    return f"{folder}({', '.join(map(str, (*args, *end)))})"


@cache
def functions(target: GpuTarget) -> tvm.IRModule:
    """Kernels as a build hands them to TVM; function op{i} is KERNELS[i]."""
    funcs = {}
    for i, (folder, args, end) in enumerate(KERNELS):
        if not families_of(folder, target.families):
            continue
        schedule = Schedule(folder, default_choice(folder, target.families))
        func = schedule.kernel(*args, target, *end)
        funcs[f"op{i}"] = func.with_attr("global_symbol", f"op{i}")
    with using(target):
        return launch_early(tvm.IRModule(funcs))


@cache
def source(target: GpuTarget, but: GpuTarget | None = None) -> str:
    """CUDA source of the kernels, of those only that are others than row `but` has."""
    kernels = dict(functions(target).functions_items())
    if but:
        theirs = functions(but)
        kernels = {
            name: func
            for name, func in kernels.items()
            if not structural_equal(func, theirs[name.name_hint])
        }
    with nvcc.uncompacted():
        built = tvm.compile(tvm.IRModule(kernels), target=target.to_tvm())
    return built.mod.imports[0].inspect_source()


def launches(text: str) -> dict[int, list[str]]:
    """By kernel, a line for each of its __global__ functions: threads, hash, PTX by count."""
    found: dict[int, list[str]] = {}
    pattern = (
        r'^extern "C" __global__ void __launch_bounds__\((\d+)(?:, \d+)?\) op(\d+)_\w+'
        r"\([^;{]*\) \{\n(.*?)^\}"
    )
    for threads, kernel, body in re.findall(pattern, text, re.MULTILINE | re.DOTALL):
        counts = Counter(re.findall(r"tvm_builtin_ptx_(\w+)\(", body))
        asked = " ".join(f"{name}*{count}" for name, count in sorted(counts.items()))
        digest = hashlib.sha256(body.encode()).hexdigest()[:12]
        line = f"  {threads:>4} threads  {digest}  {asked}".rstrip()
        found.setdefault(int(kernel), []).append(line)
    return found


def described(family: str, target: GpuTarget) -> str:
    """The golden file's lines of a family, whose first row is `target`."""
    lines, found = [], launches(source(target))
    for i, (folder, args, end) in enumerate(KERNELS):
        if (family,) == families_of(folder, target.families)[:1]:
            lines += [f"{family} {label(folder, args, end)}", *sorted(found[i])]
    return "".join(line + "\n" for line in lines)


def family_rows() -> dict[str, GpuTarget]:
    """The first row of each family."""
    return {family: row for row in reversed(GPU_ROWS) for family in row.families}


DISTINCT_ROWS = {row.families: row for row in reversed(GPU_ROWS)}  # by families, the first
OTHER_ROWS = [row for row in GPU_ROWS if row is not DISTINCT_ROWS[row.families]]


def assembled(text: str, target: GpuTarget, archs: list[str]) -> bytes:
    """A source's machine code for archs. nvcc makes PTX once, for the oldest, and assembles that
    for each: what TVM writes asks nothing of __CUDA_ARCH__ that differs among them."""
    oldest = min(archs, key=capability_of).replace("sm_", "compute_")
    flags = ["-gencode", f"arch={oldest},code=[{','.join(archs)}]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvcc, "gencode", lambda _: flags)
        return nvcc.compile_fat(text, archs, nvcc.find_nvcc(target))


def test_every_line_of_the_golden_file_is_compared():
    named = {line.split()[0] for line in GOLDEN.read_text().splitlines() if line[0] != " "}
    assert named <= set(family_rows())
    assert all(row in DISTINCT_ROWS.values() for row in family_rows().values())


@pytest.mark.parametrize("target", DISTINCT_ROWS.values(), ids=lambda row: row.name)
def test_compiles(target):
    """To the golden file's launches, then to machine code for every row of its families: that of
    which these share a kernel at least.
    """
    golden = re.split(r"(?m)^(?=\S)", GOLDEN.read_text())
    for family in (name for name, row in family_rows().items() if row is target):
        kept = "".join(part for part in golden if part.split(" ")[0] == family)
        assert described(family, target) == kept
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the PATH: compared with the golden file, not compiled")
    archs = {arch for row in GPU_ROWS if row.families == target.families for arch in row.archs}
    binary = assembled(source(target), target, sorted(archs))
    if target.can_launch_early:
        kernels = functions(target).functions_items()
        waiting = {name.name_hint for name, func in kernels if WAITS_ITSELF in func.attrs}
        early = load_before_the_wait(binary, target)
        assert early and early <= waiting  # which load weights


@pytest.mark.parametrize("target", OTHER_ROWS, ids=lambda row: row.name)
def test_compiles_for_other_rows(target):
    """To machine code, the kernels that the first row of these families does not have."""
    text = source(target, DISTINCT_ROWS[target.families])
    own = {KERNELS[i][0] for i in launches(text)}
    assert "ternary_matmul" in own  # whose tiles depend on the number of multiprocessors
    assert ("_s4_s4_" in text) == target.has_int4_units
    assert assembled(text, target, list(target.archs))


def load_before_the_wait(binary: bytes, target: GpuTarget) -> set[str]:
    """Kernels a launch of which loads from global memory before it has waited."""
    found = set()
    for name, lines in machine_code(binary, target).items():
        wait = next(number for number, line in enumerate(lines) if WAIT in line)
        if any(LOAD.search(line) for line in lines[:wait]):
            found.add(name.split("_")[0])
    return found


def machine_code(binary: bytes, target: GpuTarget) -> dict[str, list[str]]:
    """By launch, its instructions."""
    tools = os.environ | {"PATH": f"{CUDA_TOOLS}:{os.environ['PATH']}:{gpu_checks.TOOLKIT}"}
    cuobjdump = shutil.which("cuobjdump", path=tools["PATH"])
    assert cuobjdump, "no cuobjdump: in the wheels of `dev`, on the PATH or in the CUDA toolkit"
    with tempfile.NamedTemporaryFile(suffix=".fatbin") as file:
        file.write(binary)
        file.flush()
        command = [cuobjdump, "-sass", "-arch", target.archs[0], file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=tools).stdout
    parts = re.split(r"\bFunction : (\S+)\n", text)[1:]
    code = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(code) == sum(map(len, launches(source(target)).values()))
    return {name: re.findall(r"/\*[0-9a-f]{4,}\*/ +(.*?);", body) for name, body in code.items()}


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("".join(described(*row) for row in family_rows().items()))
