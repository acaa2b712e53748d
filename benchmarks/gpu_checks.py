"""What a GPU's figures rest on: the ops' tests there, and compute-sanitizer over the same kernels.

Tests are run as a user would: `pytest ... -k cuda` picks the GPU's rows. A sanitizer makes kernels
10 to 100 times slower, so it gets one process a test file, and of each file the tests that reach
every kernel and form (SANITIZED) on few shapes, and MINUTES to end.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from benchmarks.sigterm import ended_by_sigterm

TESTS = ("tests/schedules", "tests/compiler/test_pipeline.py", "tests/test_end_to_end.py")
ALONE = ("tests/compiler/test_gpu_memory.py",)  # fills the GPU, so beside no other
GPU_ROWS = "cuda and not test_cuda.py"  # test_cuda.py compiles, and needs no GPU
TOOLS = ("memcheck", "racecheck")
UNFINISHED = "unfinished:"
PASSED = re.compile(r"\b[1-9]\d* passed")
ENDED = re.compile(r"\b(\d+ (passed|failed|skipped|errors?)\b|no tests ran).* in [\d.]+s")
SUMMARY = re.compile(r"SUMMARY: (.*)")
MINUTES = 8  # the longest took some five beside 13 others
TOOLKIT = Path("/usr/local/cuda/bin")
# file of tests/schedules -> the tests of it that a sanitizer watches; those that take longest first
SANITIZED = {
    "ternary_matmul": "test_glu or test_forms_for_prompts or test_one_token or test_few",
    "rms_norm_topk": "test_matches_definition or test_ties_go_to_the_lower_index or test_without",
    "attention": "test_split or test_mixed or test_un or test_sharp or test_prompts",
    "knobs": "test_same_bits",
    "int8_matmul": "test_shapes",
    "sparse_ternary_matmul": "test_",
    "float_matmul": "test_shapes",
    "kv_append": "test_matches_definition",
    "rms_norm": "test_matches_definition",
    "request": "test_fields",
    "sample": "test_ties or test_what or test_no_number or test_a_nan or 40-1.0 or 65-1.0",
    "forms_sm90": "test_",
    "few_sm90": "test_every_form or test_both",
    "glu_matmul": "test_",
    "rope_matmul": "test_matches_definition",
    "norm_matmul": "test_matches_definition or test_keeps_the_largest",
    "rope_attention": "test_matches_definition",
    "rope": "test_",
    "embedding": "test_matches_definition",
}


class CheckError(RuntimeError):
    """A check that cannot be run; one line."""


def run_tests(processes: int) -> str:
    """pytest's last lines; CheckError with the failures where one is not green."""
    return "; ".join((_run(TESTS, processes), _run(ALONE, 1)))


def _run(tests: Sequence[str], processes: int) -> str:
    command = [sys.executable, "-m", "pytest", *tests, "-k", GPU_ROWS, "-n", str(processes)]
    with ended_by_sigterm():
        code, output = finish(command, None)
    lines = output.strip().splitlines() or ["no output"]
    last = next((line for line in reversed(lines) if ENDED.search(line)), lines[-1])
    if code:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise CheckError(f"tests: {'; '.join([last, *failed[:20]])}")
    if not PASSED.search(last):
        raise CheckError(f"tests: none ran on this GPU: {last}; possible: pytest -rs says why")
    return last


def find_sanitizer() -> str:
    if path := shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:{TOOLKIT}"):
        return path
    raise CheckError(
        f"sanitize: found no compute-sanitizer on the PATH or in {TOOLKIT}; possible: install the "
        "CUDA toolkit's cuda-sanitizer"
    )


def sanitize(tools: Sequence[str], processes: int) -> Generator[tuple[str, str]]:
    """(tool, its summaries of all files in one line), one after the other. What it complained of
    goes to stderr. Interrupted, it leaves none of its processes behind."""
    program = find_sanitizer()
    with (
        tempfile.TemporaryDirectory(prefix="bitnet-sanitize-") as name,
        ThreadPoolExecutor(processes) as pool,
        ended_by_sigterm(),
    ):
        watched = {
            tool: {file: pool.submit(watch, program, tool, file, Path(name)) for file in SANITIZED}
            for tool in tools
        }
        try:
            for tool, files in watched.items():
                yield tool, summarize({file: future.result() for file, future in files.items()})
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            futures = [future for files in watched.values() for future in files.values()]
            while not all(future.done() for future in futures):  # one may be about to start
                for process in tuple(_running):
                    kill(process)
                time.sleep(0.1)
            raise


def watch(program: str, tool: str, file: str, directory: Path) -> str | None:
    """A test file under a tool: the tool's log; None where its tests did not come to a good end."""
    log = directory / f"{tool}-{file}.log"
    tests = [f"tests/schedules/test_{file}.py", "-k", f"{GPU_ROWS} and ({SANITIZED[file]})"]
    options = ["--tool", tool, "--target-processes", "application-only", "--log-file", str(log)]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    code, output = finish([program, *options, *pytest], MINUTES * 60)
    end = " ".join(output.strip().splitlines()[-3:])
    text = log.read_text(errors="replace") if log.is_file() else ""
    if code is None:
        return _unfinished(tool, file, f"no end within {MINUTES} minutes: {end}")
    if code or not PASSED.search(end) or not SUMMARY.search(text):
        return _unfinished(tool, file, end)
    complaints = re.sub(r"(?m)^=+ ?", "", text).strip().splitlines()
    if len(complaints) > 2:  # its title and its summary
        print(f"{tool} {file}", *complaints[:200], sep="\n  ", file=sys.stderr, flush=True)
    return text


_running: set[subprocess.Popen] = set()


def kill(process: subprocess.Popen) -> None:
    """It and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def finish(command: Sequence[str], seconds: float | None) -> tuple[int | None, str]:
    """Its exit status and output; None where it had no end within its time and was killed, as it is
    where this process is interrupted."""
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    # a session of its own: what it started holds the pipe open, and is killed with it
    with subprocess.Popen(
        command, stdout=pipe, stderr=both, text=True, start_new_session=True
    ) as process:
        _running.add(process)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill(process)
            return None, process.communicate()[0]
        except BaseException:
            kill(process)
            raise
        finally:
            _running.discard(process)
    return process.returncode, output


def _unfinished(tool: str, file: str, why: str) -> None:
    print(f"sanitize: {tool} of {file}: {why}", file=sys.stderr, flush=True)


def summarize(logs: Mapping[str, str | None]) -> str:
    """The numbers of all files' summaries, added: '12 files: 0 errors'; and which have none."""
    totals: dict[str, int] = {}
    ended = [log for log in logs.values() if log is not None]
    for log in ended:
        for summary in SUMMARY.findall(log):
            for count, what in re.findall(r"(\d+) (hazard|error|warning)", summary):
                totals[what] = totals.get(what, 0) + int(count)
    text = f"{len(ended)} files: " + ", ".join(f"{n} {what}s" for what, n in totals.items())
    unfinished = [file for file, log in logs.items() if log is None]
    return f"{text}; {UNFINISHED} {' '.join(unfinished)}" if unfinished else text


def is_clean(summary: str) -> bool:
    return UNFINISHED not in summary and not re.search(r"[1-9]\d* (hazard|error|warning)", summary)
