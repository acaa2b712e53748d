"""Compile a checkpoint into an artifact directory for one machine.

    python -m compiler.build                                   the shipped model, this CPU
    python -m compiler.build --model DIR --target x86-avx2 -o dist/mine
    python -m model.random --config tiny -o /tmp/tiny && python -m compiler.build --model /tmp/tiny

Progress goes to stderr, five facts about the artifact to stdout. Exit code 2: it cannot be built,
for the reason in the one line on stderr; nothing is left half-written.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compiler.config import DEFAULT_MODEL, BuildConfig, BuildError
from compiler.progress import BuildProgress, on_stderr

if TYPE_CHECKING:
    import numpy as np

LINKERS = ("gcc", "cc", "clang")
PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "numpy")


def build(config: BuildConfig, progress: BuildProgress | None = None) -> Path:
    """Build an artifact; returns its directory. BuildError, and the like of model/, say why not."""
    # Imported here: they take seconds, which --help and a wrong option should not wait for.
    from compiler import artifact_writer, pipeline
    from compiler.export import export_model
    from compiler.kernels import using
    from compiler.ops.heads import possible_kv_bits
    from model import checkpoint
    from schedules import targets

    started, progress = time.monotonic(), progress or BuildProgress()
    try:
        target = targets.find(config.target)
    except ValueError as error:
        raise BuildError(str(error)) from error
    linker = find_linker()
    source = checkpoint.find(config.model)
    weights = checkpoint.IntegerWeights(source)
    model = weights.config
    name = re.sub(r"[^\w.-]+", "-", model.name)
    kv_bits = possible_kv_bits(model.head_dim)
    destination = config.output or Path("dist") / f"{name}-{target.name}"
    with (
        artifact_writer.replacing(destination) as directory,
        using(target) as kernels,
        target.to_tvm(),
    ):
        with progress.phase("export"):
            exported = export_model(model)
        with progress.phase("lower"):
            lowered = pipeline.lower(exported, kv_bits, config.debug_dump)
        with progress.phase("pack weights"):
            parameters = artifact_writer.parameters_of(lowered)
            params = artifact_writer.write_params(
                directory, parameters, partial(read_tensor, weights), progress.advance
            )
        with progress.phase("compile kernels"):
            pipeline.compile_library(lowered, target, directory / artifact_writer.LIBRARY, linker)
        with progress.phase("write"):
            files = artifact_writer.copy_model_files(directory, model, source)
            facts = {
                "model": name,
                "target": target.name,
                "cpu_flags": list(target.cpu_flags),
                "kv_bits": kv_bits,
                "default_kv_bits": model.kv_bits if model.kv_bits in kv_bits else 16,
                "context_length": model.max_position_embeddings,
                **params,
                "record": {
                    "versions": versions(),
                    "tvm_target": target.tvm,
                    "seconds": round(time.monotonic() - started, 1),
                    "kernels": kernels.record,
                },
            }
            artifact_writer.write_manifest(directory, facts, files)
    return destination


def read_tensor(weights: Mapping[str, "np.ndarray"], name: str) -> "np.ndarray":
    """One tensor of a checkpoint; what torch or safetensors say of a bad one becomes one line."""
    try:
        return weights[name]
    except BuildError:
        raise
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BuildError(f"checkpoint: cannot read {name}: {reason[0]}") from error


def find_linker() -> str:
    """The C compiler that links the library."""
    for name in LINKERS:
        if path := shutil.which(name):
            return path
    raise BuildError(
        f"linker: asked for a C compiler, found none of {', '.join(LINKERS)} on the PATH; "
        "possible: apt-get install gcc"
    )


def versions() -> dict[str, str]:
    found = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), **found}


def parse(argv: list[str] | None) -> BuildConfig:
    parser = argparse.ArgumentParser(
        prog="python -m compiler.build", description=(__doc__ or "").split("\n")[0]
    )
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
        help="a row of schedules/targets.py, or native, the best one for this CPU (the default)",
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
    return BuildConfig(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> int:
    config = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as for Ctrl-C
    started = time.monotonic()
    try:
        with on_stderr() as progress:
            directory = build(config, progress)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return refuse(f"{where}{error.strerror or error}")
    except ValueError as error:  # BuildError, CheckpointError, ConfigError
        return refuse(str(error))
    except ImportError as error:
        return refuse(f"{error}; possible: pip install 'bitnet-compiler[export]'")
    except KeyboardInterrupt:
        print("compiler.build: interrupted; nothing was written", file=sys.stderr)
        return 130
    report(directory, time.monotonic() - started)
    return 0


def refuse(problem: str) -> int:
    print(f"compiler.build: {' '.join(problem.split())}", file=sys.stderr)
    return 2


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
