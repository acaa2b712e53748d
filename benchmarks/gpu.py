"""Check and time the CUDA kernels on the GPU that is here, side by side with PyTorch's.

    python -m benchmarks.gpu                      everything: a table, and benchmarks/gpu.json
    python -m benchmarks.gpu --check --sanitize   the tests and compute-sanitizer before
    python -m benchmarks.gpu --only gemv gemm     some groups, no file; --only alone: none
    python -m benchmarks.gpu --sanitize racecheck --only --output benchmarks/gpu.json
                                                  one more part into the file of the same commit
    python -m benchmarks.gpu --w2a8 libbitnet.so  Microsoft's GEMV beside ours, of the user's build
    python -m benchmarks.gpu --artifact DIR       a built model's decode step and prompts, too

Needs a GPU, nvcc, TVM's compiler and a PyTorch with CUDA. Every kernel is checked against PyTorch
on the inputs that it is timed on, exactly where it is integer. Times are of one CUDA graph over
several copies of the weights or the cache, three times the L2 in all, so that they come from
memory, and of everything where a kernel has neither; median and spread of its replays, divided by
the calls in it. Ours are launched as in a model: each while the one before runs (LaunchEarly).
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import tvm
import tvm_ffi

from benchmarks import gpu_checks, gpu_prefill, gpu_step, w2a8
from benchmarks.commit import commit
from benchmarks.gpu_case import Case
from benchmarks.gpu_cases import COLD_BYTES, GROUPS, cases
from command_line import Parser
from compiler import nvcc
from compiler.kernels import Schedule, default_choice, using
from compiler.passes.launch_early import launch_early
from runtime import device_code
from runtime.engine import Engine
from schedules.targets import GpuTarget, find

CALLS = (20, 400)  # of a kernel in one graph, at least and at most
REPLAYS = 15
PROCESSES = 12
CONTEXT, PROMPTS = 512, (512, 2048)  # of a whole model
MODEL_PARTS = "prefill", "step"  # the latter loads CUPTI, which stays
KEPT = Path("benchmarks/gpu.json")


@dataclass
class Timing:
    us: float
    spread_us: float  # between the quarters of the replays

    @property
    def text(self) -> str:
        return f"{self.us:.2f} ± {self.spread_us:.2f}"


@dataclass
class Bench:
    target: GpuTarget
    compiler: str

    def build(self, case: Case) -> Callable:
        schedule = Schedule(case.folder, default_choice(case.folder, self.target.families))
        func = schedule.kernel(*case.kernel_args, self.target, *case.kernel_end)
        mod = tvm.IRModule({"kernel": func.with_attr("global_symbol", "kernel")})
        with using(self.target), nvcc.uncompacted():  # a context is a thread's own
            mod = launch_early(mod)
            return tvm.compile(mod, target=self.target.to_tvm())["kernel"]

    @cached_property
    def read_bandwidth(self) -> float:
        """Bytes a second that a sum over 4 GiB reads."""
        data = torch.ones(2**29, dtype=torch.float64, device="cuda")
        timing = time_calls(lambda i: data.sum(), 1)
        return data.nbytes / timing.us * 1e6


def time_calls(call: Callable[[int], object], calls: int) -> Timing:
    """Of one of call(0), call(1), ..., captured in one graph."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with tvm_ffi.use_torch_stream(torch.cuda.graph(graph)):
        for i in range(calls):
            call(i)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    low, _, high = statistics.quantiles(times)
    return Timing(statistics.median(times), (high - low) / 2)


def run(bench: Bench, case: Case, kernel: Callable) -> dict:
    arrays = case.inputs()
    kernel(*arrays)
    results = arrays[len(arrays) - case.results :]
    for found, wanted in zip(results, case.expected(arrays), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, msg=lambda m: f"{case.name}: {m}")
    is_cold = [i in case.cold or not case.cold for i in range(len(arrays))]
    size = sum(a.nbytes for a, cold in zip(arrays, is_cold, strict=True) if cold)
    copies = max(1, min(CALLS[1], -(-COLD_BYTES // size)))
    sets = [arrays] + [
        [a.clone() if cold else a for a, cold in zip(arrays, is_cold, strict=True)]
        for _ in range(copies - 1)
    ]
    calls = max(CALLS[0], copies)
    ours = time_calls(lambda i: kernel(*sets[i % copies]), calls)
    row = {"group": case.group, "name": case.name, "us": ours.us, "spread_us": ours.spread_us}
    row["rivals"] = {
        name: asdict(time_calls(lambda i, rival=rival: rival(sets[i % copies]), calls))
        for name, rival in case.rivals.items()
    }
    if case.published_us:
        row["published_us"] = case.published_us
    if case.read_bytes:
        row["bandwidth_share"] = case.read_bytes / (ours.us * 1e-6) / bench.read_bandwidth
    if case.operations:
        row["tops"] = case.operations / ours.us * 1e-6
    show(row)
    return row


def show(row: dict) -> None:
    parts = [f"{row['group']:9} {row['name']:34} {row['us']:9.2f} ± {row['spread_us']:.2f} us"]
    if "bandwidth_share" in row:
        parts.append(f"{row['bandwidth_share']:4.0%} of read bandwidth")
    if "tops" in row:
        parts.append(f"{row['tops']:.0f} TOPS")
    if "published_us" in row:
        parts.append(f"{row['published_us'] / row['us']:.2f} x Microsoft's {row['published_us']}")
    for name, timing in row["rivals"].items():
        parts.append(f"{timing['us'] / row['us']:.2f} x {name} {timing['us']:.1f}")
    print(", ".join(parts), flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--check", action="store_true", help="run the tests of tests/schedules on the GPU first")
    add("--sanitize", nargs="*", choices=gpu_checks.TOOLS, metavar="TOOL",
        help=f"run them under compute-sanitizer, too ({', '.join(gpu_checks.TOOLS)}; "
        "default: both)")  # fmt: skip
    add("--only", nargs="*", choices=GROUPS, metavar="GROUP",
        help=f"time these groups ({', '.join(GROUPS)}); keeps no file unless --output names one"
        )  # fmt: skip
    add("--target", default="cuda", metavar="ROW", help="whose kernels (default: this GPU's)")
    add("--w2a8", type=Path, metavar="FILE", help="Microsoft's libbitnet.so, in place of its "
        "published times")  # fmt: skip
    add("--artifact", type=Path, metavar="DIR", help="a model of compiler.build for this GPU: "
        "time its decode step and prompts, too")  # fmt: skip
    add("--output", type=Path, metavar="FILE", help=f"default: {KEPT}, if all groups are timed; "
        "what it has of the same commit, GPU and target stays where it is not measured anew"
        )  # fmt: skip
    add("--commit", help="where the checkout is no repository")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a GPU that PyTorch can use, found none; possible: a host with one")
    try:
        args.target = find(args.target)
        args.nvcc = nvcc.find_nvcc(args.target)
        args.w2a8 = w2a8.load(args.w2a8) if args.w2a8 else None
        if args.artifact:
            gpu_step.open_artifact(args.artifact, args.target.name)
        if args.sanitize is not None:
            gpu_checks.find_sanitizer()
    except (ValueError, w2a8.LibraryError, gpu_checks.CheckError) as refusal:
        parser.error(str(refusal))
    args.of = {
        "commit": args.commit or commit(),
        "device": torch.cuda.get_device_name(),
        "target": args.target.name,
    }
    args.output = args.output or (KEPT if args.only is None else None)
    if args.output and not args.output.parent.is_dir():
        parser.error(f"output: asked for {args.output}, its folder is not there; possible: another")
    try:
        args.kept = earlier(args.output, args.of)
    except OSError as error:
        parser.error(f"output: cannot read {args.output}: {error.strerror}; possible: another")
    except ValueError as other:
        if args.only is not None:
            parser.error(
                f"output: asked to add to {args.output}, {other}; possible: another file, or a run "
                "of all groups, which takes its place"
            )
        args.kept = {}
    return args


def versions() -> dict[str, str]:
    """Of PyTorch, of the CUDA that it was built with, and of the driver where it tells."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
        found["driver"] = done.stdout.strip()
    return found


def measure(
    bench: Bench, groups: Sequence[str], function: Callable | None
) -> tuple[list[dict], list[str]]:
    """(a row for each case, names of those that failed). `function` is Microsoft's."""
    wanted = [case for case in cases(bench.target) if case.group in groups]
    if function:
        wanted = [beside(function, case) for case in wanted]
    with nvcc.compiling_for(bench.target, bench.compiler), ThreadPoolExecutor(PROCESSES) as pool:
        kernels = [pool.submit(bench.build, case) for case in wanted]
    rows, failed = [], []
    for case, kernel in zip(wanted, kernels, strict=True):
        try:
            rows.append(run(bench, case, kernel.result()))
            torch.cuda.empty_cache()
        except Exception as failure:  # the other cases' results must not be lost
            failed.append(told(f"{case.group} {case.name}", failure))
    return rows, failed


def beside(function: Callable, case: Case) -> Case:
    """The case with Microsoft's GEMV as its rival, where that has the shape."""
    if case.published_us is None:
        return case
    n, k = case.kernel_args[:2]
    copies = min(CALLS[1], -(-COLD_BYTES * 4 // (n * k)))
    rivals = case.rivals | {"Microsoft's W2A8": w2a8.rival(function, n, k, copies)}
    return replace(case, published_us=None, rivals=rivals)


def measure_model(engine: Engine, found: dict) -> Iterator[str | None]:
    """Into `found`, a part at a time: prompts, then a decode step of a built model. Yields the
    part's name where it failed."""
    length = engine.artifact.context_length
    found |= {"model": engine.artifact.model, "kv_bits": engine.kv_bits}
    found["library_sha256"] = engine.artifact.manifest["library"]["sha256"]
    context = min(CONTEXT, length - gpu_step.WARM - gpu_step.STEPS)
    calls: tuple[Callable, ...] = (
        lambda: gpu_prefill.compare(engine, [n for n in PROMPTS if n <= length], REPLAYS),
        lambda: gpu_step.measure(engine, context),
    )
    for part, call in zip(MODEL_PARTS, calls, strict=True):
        try:
            found[part] = call()
        except Exception as failure:  # the other part's result must not be lost
            yield told(part, failure)
        else:
            yield None


def told(case: str, failure: Exception) -> str:
    kind = "WRONG" if isinstance(failure, AssertionError) else type(failure).__name__
    print(f"{kind} {case}: {str(failure)[:400]}", flush=True)
    return case


def earlier(output: Path | None, of: dict[str, str]) -> dict:
    """What the file has already. OSError; ValueError with what it is, where that is not `of` this
    commit, GPU and target."""
    if output is None or not output.exists():
        return {}
    try:
        kept = json.loads(output.read_bytes())
        found = {name: kept[name] for name in of}
    except (ValueError, TypeError, LookupError):
        raise ValueError("found no file that benchmarks.gpu wrote") from None
    if found != of:
        asked, there = (", ".join(map(str, names.values())) for names in (of, found))
        raise ValueError(f"it is of {there}, here is {asked}")
    if of["commit"].endswith(("-dirty", "unknown")):
        raise ValueError(f"it is of {of['commit']}, which may have been other sources")
    return kept


def without(kept: dict, replaced: Sequence[str]) -> dict:
    """`kept` but for the groups and the parts of a model that are `replaced`."""
    rest = {name: value for name, value in kept.items() if name not in replaced}
    rest["failed"] = [case for case in kept.get("failed", []) if case.split()[0] not in replaced]
    rest["rows"] = [row for row in kept.get("rows", []) if row["group"] not in replaced]
    return rest


def keep(output: Path | None, measured: dict) -> None:
    if output:
        output.write_text(json.dumps(measured, indent=1) + "\n")


def check(args: argparse.Namespace, found: dict) -> bool:
    """What was asked for of the tests and sanitizers, kept as it is there; whether all are clean.
    Raises CheckError."""
    if args.check:
        found.pop("tests", None)
        keep(args.output, found)
        found["tests"] = gpu_checks.run_tests(PROCESSES)
        print(f"tests: {found['tests']}", flush=True)
        keep(args.output, found)
    if args.sanitize is None:
        return True
    summaries = found["sanitizers"] = dict(found.get("sanitizers", {}))
    is_clean = True
    with closing(gpu_checks.sanitize(args.sanitize or gpu_checks.TOOLS, PROCESSES)) as ended:
        for tool, summary in ended:
            summaries[tool] = summary
            is_clean &= gpu_checks.is_clean(summary)
            print(f"{tool}: {summary}", flush=True)
            keep(args.output, found)
    return is_clean


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    device_code.install()
    groups = GROUPS if args.only is None else args.only
    found = without(args.kept, (*groups, *(MODEL_PARTS if args.artifact else ()))) | args.of
    try:
        is_clean = check(args, found)
    except gpu_checks.CheckError as failure:
        print(f"benchmarks.gpu: {failure}", file=sys.stderr)
        return 1
    failed = []
    if groups:
        bench = Bench(args.target, args.nvcc)
        if found["rows"]:  # of other groups: one read for all shares of a file
            bench.read_bandwidth = found["read_gb_per_s"] * 1e9
        found["date"] = datetime.date.today().isoformat()
        found |= versions()
        found["read_gb_per_s"] = bench.read_bandwidth / 1e9  # what the rows' shares are of
        print(", ".join(f"{key} {found[key]}" for key in ("read_gb_per_s", *args.of)), flush=True)
        rows, failed = measure(bench, groups, args.w2a8)
        found["rows"] += rows
        found["failed"] += failed
        keep(args.output, found)
    if args.artifact:
        for part in measure_model(gpu_step.open_engine(args.artifact), found):
            if part:
                failed.append(part)
                found["failed"].append(part)
            keep(args.output, found)
    return 0 if is_clean and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
