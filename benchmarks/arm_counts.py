"""Count what the ARM kernels cost where no ARM machine is: instructions, and a model's cycles.

    python -m benchmarks.arm_counts
    python -m benchmarks.arm_counts --peer dotprod=libtheirs.so -o DIR

These are counts, not times. Instructions are those that run, by a plugin of qemu-user over a whole
call with one thread: tables, tails and epilogues included, quantising activations not. Cycles are
llvm-mca's of the innermost loop alone, as if every load hit L1, divided by its products.

A product is one weight times one activation. `--peer LEVEL=LIBRARY` adds ggml's TQ2_0 and TQ1_0 dot
products from an aarch64 library that you built from their sources for the instructions of LEVEL
(neon, dotprod, i8mm); `--peer` may be repeated. Prints a table, writes arm_counts.json and .svg.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

os.environ["TVM_NUM_THREADS"] = "1"  # before tests.schedules.compiled, which would take three

from command_line import Parser
from schedules.layouts import LAYOUTS
from schedules.targets import TARGETS
from tests.arm import emulator
from tests.schedules.compiled import compiled, family
from tests.schedules.matmul_reference import activations, exact_sum, module, ones, weights

LEVELS = {"neon": "arm-neon", "dotprod": "arm-dotprod", "i8mm": "arm-i8mm"}
PEERS = ("ggml_vec_dot_tq2_0_q8_K", "ggml_vec_dot_tq1_0_q8_K")
# What llvm-mca models. For the A76 it has A57's pipeline; Neoverse N1 is its server version.
CORES = {"A76 (neoverse-n1)": "neoverse-n1", "V2": "neoverse-v2", "Apple (cyclone)": "apple-m1"}
PRODUCTS = {"tbl": 32, "sdot": 16, "smmla": 32, "smlal": 8, "smlal2": 8, "smull": 8, "smull2": 8}
LLVM_MCA = [*(f"llvm-mca-{version}" for version in range(30, 13, -1)), "llvm-mca"]


@dataclass
class Row:
    kernel: str
    level: str
    act_bits: int
    m: int
    instructions: float  # a product, of the whole call
    loop: int = 0  # instructions of the innermost loop
    cycles: dict[str, float] = field(default_factory=dict)  # a product, by core


# ---- Instructions


def build_plugin(directory: Path) -> Path:
    library = directory / "insn_plugin.so"
    source = Path(__file__).with_name("insn_plugin.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", source, "-o", library], check=True)
    return library


def between_marks(printed: str) -> int:
    marks = [int(count) for count in printed.split()]
    assert marks and len(marks) % 2 == 0, f"marks do not pair: {printed!r}"
    return sum(end - start for start, end in zip(marks[::2], marks[1::2], strict=True))


def count_kernel(kernel: emulator.EmulatedKernel, arrays: list[np.ndarray], plugin: Path) -> int:
    process = emulator.Emulator("max", ("-plugin", str(plugin)))
    process.call(kernel.library, arrays)
    return between_marks(process.stop())


def count_peer(runner: Path, library: Path, name: str, k: int, plugin: Path) -> int:
    qemu = ["qemu-aarch64", "-cpu", "max", "-L", emulator.LIBRARIES, "-plugin", str(plugin)]
    command = [*qemu, runner, library, name, str(k), "8"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"arm_counts: {library}: {found.stderr.strip()}")
    return between_marks(found.stderr)


# ---- Cycles


def disassemble(library: Path, function: str | None = None) -> list[tuple[int, str]]:
    """(address, instruction) of a library, or of one function."""
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(library)]
    if function:
        command.append(f"--disassemble={function}")
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = re.findall(r"^ +([0-9a-f]+):\t(.+)$", text, re.M)
    return [(int(at, 16), re.sub(r"\s*(//.*|<.*>)", "", line).strip()) for at, line in lines]


def innermost_loops(code: list[tuple[int, str]]) -> Iterator[list[str]]:
    """Bodies that end with a branch to their first instruction and branch nowhere else."""
    at = {address: i for i, (address, _) in enumerate(code)}
    for i, (address, line) in enumerate(code):
        jump = re.match(r"(?:b\.\w+|cbn?z|tbn?z)\s+(?:.*,\s*)?([0-9a-f]+)$", line)
        if jump and (start := at.get(int(jump[1], 16))) is not None and code[start][0] < address:
            body = [line for _, line in code[start:i]]
            if not any(re.match(r"(b|bl|ret|cbn?z|tbn?z|b\.\w+)\b", line) for line in body):
                yield body


def products_of(loop: list[str]) -> int:
    return sum(PRODUCTS.get(line.split()[0], 0) for line in loop)


def hot_loop(loops: list[list[str]], m: int) -> list[str]:
    """The loop of one row unpacks weights, and is the shortest that does; that of many rows has
    most products an instruction."""
    loops = [loop for loop in loops if products_of(loop)]
    if m > 1:
        return max(loops, key=lambda loop: products_of(loop) / len(loop))
    unpacks = [loop for loop in loops if any(re.match(r"(and|ushr)\s+v", line) for line in loop)]
    return min(unpacks or loops, key=lambda loop: (len(loop) < 20, len(loop)))


def cycles(loop: list[str], core: str, mca: str) -> float:
    """Of one iteration in the steady state; NaN where this LLVM does not know the core."""
    known = [re.sub(r"^adrp\s+(\w+),.*", r"adrp \1, 0", line) for line in loop]
    text = "\n".join([*known, "subs x30, x30, #1", "b.ne 0"]) + "\n"
    features = "-mattr=+dotprod,+i8mm"
    command = [mca, "-mtriple=aarch64", f"-mcpu={core}", features, "-iterations=200"]
    found = subprocess.run(command, input=text, capture_output=True, text=True)
    total = re.search(r"Total Cycles:\s+(\d+)", found.stdout)
    if not total:
        sys.stderr.write(found.stderr[:300])
        return float("nan")
    return int(total[1]) / 200


def add_cycles(row: Row, loops: list[list[str]], mca: str | None) -> None:
    loop = hot_loop(loops, row.m)
    row.loop = len(loop)
    if mca:
        row.cycles = {n: cycles(loop, core, mca) / products_of(loop) for n, core in CORES.items()}


# ---- What is compared


def our_rows(n: int, k: int, m: int, plugin: Path, mca: str | None) -> Iterator[Row]:
    for level, name in LEVELS.items():
        target = TARGETS[name]
        kernels = module("ternary_matmul", target)
        for act_bits in (4, 8):
            kernel = compiled(kernels.kernel(n, k, act_bits, target, "scale"), target)
            w, layout = weights("random", n, k), LAYOUTS[kernels.layout(act_bits)]
            loops = [*innermost_loops(disassemble(kernel.library))]
            for rows in (1, m):
                q, (scale, w_scale) = activations("random", rows, k, act_bits), ones(rows, n)
                out = np.full((rows, n), np.nan, np.float32)
                arrays = [q, scale, layout.pack(w), w_scale, out]
                np.testing.assert_array_equal(kernel(*arrays)[-1], exact_sum(q, w))
                count = count_kernel(kernel, arrays, plugin)
                label = f"{family('ternary_matmul', target)}, {layout.name}"
                row = Row(label, level, act_bits, rows, count / (rows * n * k))
                add_cycles(row, loops, mca)
                yield row


def other_rows(n: int, k: int, plugin: Path) -> Iterator[Row]:
    """The other ops that read weights or the cache, for one row. A product of a sparse matmul is
    one of the dense matrix, 84 % of the codes zero; of attention (20 heads, 5 of keys and values,
    D = 128, 3 bits, position 511) one of either product."""
    rng = np.random.default_rng(0)
    zeros = np.zeros(1, np.int64)
    for level, name in LEVELS.items():
        target = TARGETS[name]
        q, (scale, w_scale) = activations("random", 1, k, 8), ones(1, n)
        out = np.full((1, n), np.nan, np.float32)
        head = module("int8_matmul", target).kernel(n, k, target)
        table = activations("random", n, k, 8)
        yield other_row("int8_matmul", level, head, [q, scale, table, w_scale, out], n * k, plugin)

        kernels = module("sparse_ternary_matmul", target)
        w = LAYOUTS[kernels.layout()].pack(weights("random", n, k))
        q = np.where(rng.random((1, k)) < 0.84, 0, q).astype(np.int8)
        index = np.argsort(q == 0, axis=1, kind="stable").astype(np.int32)
        active = (q != 0).sum(1).astype(np.int32)
        arrays = [q, scale, index, active, w, w_scale, out * 0, out]
        sparse = kernels.kernel(n, k, target)
        yield other_row("sparse_ternary_matmul", level, sparse, arrays, n * k, plugin)

        heads, kv_heads, dim, seen = 20, 5, 128, 512
        qkv = rng.standard_normal((1, (heads + 2 * kv_heads) * dim)).astype(np.float32)
        codes = rng.integers(0, 256, (1, kv_heads, 2, dim // 2 + (seen - 1) * 48), np.uint8)
        scales = np.ones((1, kv_heads, 2, seen), np.float16)
        arrays = [qkv, codes, scales, zeros, zeros + seen - 1, qkv[:, : heads * dim].copy()]
        attention = module("attention", target).kernel(heads, kv_heads, dim, 3, target)
        count = 2 * heads * dim * seen
        yield other_row("attention", level, attention, arrays, count, plugin)


def other_row(op: str, level: str, func, arrays: list, products: int, plugin: Path) -> Row:
    target = TARGETS[LEVELS[level]]
    count = count_kernel(compiled(func, target), arrays, plugin)
    return Row(f"{op}, {family(op, target)}", level, 8, 1, count / products)


def peer_rows(
    peers: list[tuple[str, Path]], k: int, m: int, runner: Path, plugin: Path, mca: str | None
) -> Iterator[Row]:
    """Both formats have 8-bit activations and one dot product for one row and for many."""
    for level, library in peers:
        for name in PEERS:
            count = count_peer(runner, library, name, k, plugin)
            loops = [*innermost_loops(disassemble(library, name))]
            label = "ggml " + re.sub(r"ggml_vec_dot_(.*)_q8_K", r"\1", name).upper()
            row = Row(label, level, 8, 1, count / (8 * k))
            add_cycles(row, loops, mca)
            yield row
            yield Row(**{**asdict(row), "m": m})


def build_peer_runner(directory: Path) -> Path:
    runner = directory / "dot_runner"
    source = Path(__file__).with_name("dot_runner.cpp")
    subprocess.run(["aarch64-linux-gnu-g++", "-O1", source, "-o", runner, "-ldl"], check=True)
    return runner


# ---- What is printed


def best_peer(rows: list[Row], row: Row) -> Row | None:
    same = [r for r in rows if r.kernel.startswith("ggml") and (r.level, r.m) == (row.level, row.m)]
    return min(same, key=lambda r: r.instructions, default=None)


def table(rows: list[Row]) -> str:
    head = ["instructions", "kernel", "act bits", "M", "instr/product", "of best peer", "loop"]
    lines = [[*head, *(f"cycles/product {core}" for core in CORES)]]
    for row in rows:
        peer = None if row.kernel.startswith("ggml") else best_peer(rows, row)
        ratio = f"{row.instructions / peer.instructions:.2f}" if peer else ""
        count, loop = f"{row.instructions:.4f}", str(row.loop or "")
        some = [row.level, row.kernel, str(row.act_bits), str(row.m), count, ratio, loop]
        found = (row.cycles.get(core) for core in CORES)
        lines.append([*some, *(f"{c:.4f}" if c else "" for c in found)])
    rule = ["---"] * len(lines[0])
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.32 * len(rows) + 1.5), sharey=False)
    for axis, is_one in zip(axes, (True, False), strict=True):
        shown = [row for row in rows if (row.m == 1) == is_one]
        names = [f"{row.kernel}, {row.level}, A{row.act_bits}" for row in shown]
        colors = ["tab:gray" if row.kernel.startswith("ggml") else "tab:blue" for row in shown]
        axis.barh(names, [row.instructions for row in shown], color=colors)
        axis.invert_yaxis()
        axis.set_title("one row" if is_one else f"{shown[0].m} rows")
        axis.set_xlabel("instructions a product (a count, not a time)")
    figure.tight_layout()
    figure.savefig(path)


def peer(text: str) -> tuple[str, Path]:
    level, _, library = text.partition("=")
    if level not in LEVELS or not Path(library).is_file():
        raise argparse.ArgumentTypeError(
            f"asked for {text!r}; possible: LEVEL=LIBRARY, LEVEL one of {', '.join(LEVELS)}, "
            "LIBRARY an aarch64 .so with " + " and ".join(PEERS)
        )
    return level, Path(library)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.arm_counts")
    parser.add_argument("--peer", type=peer, action="append", default=[], metavar="LEVEL=LIBRARY")
    parser.add_argument("-n", type=int, default=2560, help="outputs (default: %(default)s)")
    parser.add_argument("-k", type=int, default=2560, help="columns (default: %(default)s)")
    parser.add_argument("-m", type=int, default=64, help="many rows (default: %(default)s)")
    parser.add_argument("-o", type=Path, default=Path("."), metavar="DIR", help="of json and svg")
    args = parser.parse_args(argv)
    if min(args.n, args.k, args.m) < 1:
        parser.error(f"n, k, m: asked for {args.n}, {args.k}, {args.m}; possible: 1 and more")
    if reason := emulator.missing():
        parser.error(reason)
    try:
        args.o.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"o: cannot write to {args.o} ({error.strerror}); possible: a directory")
    mca = next((path for name in LLVM_MCA if (path := shutil.which(name))), None)
    print(f"cycles by {mca or 'nothing: found no llvm-mca; apt-get install llvm'}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="bitnet-counts-") as name:
        plugin = build_plugin(Path(name))
        rows = [*our_rows(args.n, args.k, args.m, plugin, mca)]
        if args.peer:
            runner = build_peer_runner(Path(name))
            rows += peer_rows(args.peer, args.k, args.m, runner, plugin, mca)
        others = [*other_rows(args.n, args.k, plugin)]
    rows.sort(key=lambda row: ([*LEVELS].index(row.level), row.m, row.instructions))
    print(table(rows), table(others), sep="\n\n")
    (args.o / "arm_counts.json").write_text(
        json.dumps([asdict(row) for row in rows + others], indent=1)
    )
    plot(rows, args.o / "arm_counts.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
