"""Compile a checkpoint into an artifact directory for one machine.

    python -m compiler.build                                   the shipped model, this CPU
    python -m compiler.build --model DIR --target x86-avx2 -o dist/mine
    python -m model.random --config tiny -o /tmp/tiny && python -m compiler.build --model /tmp/tiny

Progress goes to stderr, five facts about the artifact to stdout. Exit code 2: it cannot be built,
for the reason in the one line on stderr; nothing is left half-written.
"""

import json
import signal
import sys
import time
from pathlib import Path

from command_line import Parser, refuse
from compiler.config import DEFAULT_MODEL, BuildConfig, BuildError
from compiler.progress import BuildProgress, on_stderr


def build(config: BuildConfig, progress: BuildProgress | None = None) -> Path:
    """Build an artifact; returns its directory. BuildError, and the like of model/, say why not."""
    # Imported as they are needed: all take 8 s, but a wrong target is known after 3.
    from schedules import targets

    progress = progress or BuildProgress()
    try:
        target = targets.find(config.target)
    except ValueError as error:
        raise BuildError(str(error)) from error
    if config.target == "cuda":
        progress.say(f"target cuda: {targets.why_cuda(target)}")

    from compiler import head_bits, toolchain
    from model import checkpoint
    from model.config import ModelConfig

    linker = toolchain.find_linker(target)
    toolchain.require_device_compiler(target)
    source = checkpoint.find(config.model)
    model = ModelConfig.load(source)
    weights = checkpoint.IntegerWeights(source, head_bits.choose(config.head_bits, model, target))

    if config.debug_dump:
        make_dump_directory(config.debug_dump)

    from compiler.artifact_writer import replacing
    from compiler.assemble import artifact_name, assemble

    default = Path("dist") / f"{artifact_name(weights.config)}-{target.name}"
    destination = config.output or default
    with replacing(destination) as directory:
        assemble(directory, weights, target, linker, config.debug_dump, config.records, progress)
    return destination


def make_dump_directory(path: Path) -> None:
    """Before the first pass: TVM turns an OSError within one into a trace of its own."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"debug-dump: asked for {path}, cannot make it ({error.strerror}); "
            "possible: a directory that can be written"
        ) from error


def parse(argv: list[str] | None) -> BuildConfig:
    parser = Parser(prog="python -m compiler.build", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|DIR",
        help="a shipped model, or a directory with config.json and model.safetensors "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        default="native",
        metavar="TARGET",
        help="a row of schedules/targets.py; native, the best one for this CPU (the default); or "
        "cuda, the one for the GPU that is here, for all archs where none is",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="the artifact (default: dist/<model>-<target>); an older one is replaced",
    )
    parser.add_argument(
        "--debug-dump", type=Path, metavar="DIR", help="write the IR between the phases there"
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        choices=(8, 6, 4),
        metavar="8|6|4",
        help="bits of a weight of the head, and of the embedding where they are one table "
        "(default: 6 where there are kernels for it, which is x86; else 8)",
    )
    parser.add_argument(
        "--records",
        metavar="DIR|none",
        help="tuning records to look into before this user's and the shipped ones; "
        "none: every kernel at its default",
    )
    return BuildConfig(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    config = parse(argv)
    interrupted = watch_interrupts()
    started = time.monotonic()
    try:
        with on_stderr() as progress:
            directory = build(config, progress)
    except BaseException as error:
        if interrupted:  # whatever TVM made of the KeyboardInterrupt within a pass
            print("compiler.build: interrupted; nothing was written", file=sys.stderr)
            return 130
        if problem := explain(error, config):
            return refuse("compiler.build", problem)
        raise
    report(directory, time.monotonic() - started)
    return 0


def watch_interrupts() -> list[int]:
    """The signals met from here on: Ctrl-C, and SIGTERM, which then cleans up like Ctrl-C."""
    met: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        met.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    return met


def explain(error: BaseException, config: BuildConfig) -> str | None:
    """One line for what the user can mend; None for a defect of ours."""
    if isinstance(error, OSError):
        return f"{error.filename or config.output or 'output'}: {error.strerror or error}"
    if isinstance(error, ValueError):  # BuildError, CheckpointError, ConfigError
        return str(error)
    if isinstance(error, ImportError):
        return f"{error}; possible: pip install 'bitnet-compiler[export]'"
    return None


def report(directory: Path, seconds: float) -> None:
    manifest = json.loads((directory / "artifact.json").read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"model    {manifest['model']}")
    print(f"target   {manifest['target']}")
    print(f"size     {size / 2**20:.1f} MiB")
    print(f"seconds  {seconds:.1f}")
    print(f"where    {directory}")


if __name__ == "__main__":
    sys.exit(main())
