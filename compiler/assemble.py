"""assemble: the phases of a build, from a checkpoint's weights to the files of an artifact."""

import importlib.metadata
import platform
import re
import time
from functools import partial
from pathlib import Path

import numpy as np

from compiler import artifact_writer, pipeline
from compiler.config import NO_RECORDS, BuildError
from compiler.export import export_model
from compiler.kernels import KernelTable, default_choice, find_module, using
from compiler.ops.heads import possible_kv_bits
from compiler.passes.record_workspace import ATTR as WORKSPACE
from compiler.progress import BuildProgress
from compiler.tuning.lookup import Lookup, default_roots
from model.checkpoint import CheckpointError, IntegerWeights
from model.config import ModelConfig
from schedules.targets import GpuTarget, TargetSpec, why_not_fp4

PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "numpy")


def assemble(
    directory: Path,
    weights: IntegerWeights,
    target: TargetSpec,
    linker: str,
    debug_dump: Path | None,
    records: str | None,
    progress: BuildProgress,
) -> None:
    """Write every file of the artifact into `directory`."""
    started, model = time.monotonic(), weights.config
    artifact_writer.require_tokenizer(weights.directory, model.vocab_size)
    kv_bits = possible_kv_bits(model.head_dim)
    lookup = find_records(target, records)
    for note in lookup.notes:
        progress.say(f"records: {note}")
    is_fp4 = model.variant == "a4.8" and model.activation_format == "fp4"
    if is_fp4 and (told := why_not_fp4(target)):
        progress.say(told)
    with using(target, lookup) as kernels, target.to_tvm():
        with progress.phase("export"):
            exported = export_model(model)
        with progress.phase("lower"):
            lowered = pipeline.lower(exported, kv_bits, debug_dump)
        if passed_over := sorted(set(kernels.passed_over)):
            progress.say(
                f"records: of other kernels than these, not used: {', '.join(passed_over)}; "
                "possible: python -m compiler.tune"
            )
        with progress.phase("pack weights"):  # before the long phase: it may refuse the checkpoint
            params = artifact_writer.write_params(
                directory,
                artifact_writer.parameters_of(lowered),
                partial(read_tensor, weights),
                progress.advance,
            )
        with progress.phase("compile kernels"):
            pipeline.compile_library(lowered, target, directory / artifact_writer.LIBRARY, linker)
        with progress.phase("write"):
            files = artifact_writer.copy_model_files(directory, model, weights.directory)
            facts = describe(model, target, kv_bits) | params
            if WORKSPACE in lowered.attrs:
                facts[WORKSPACE] = int(lowered.attrs[WORKSPACE])
            record = build_record(target, kernels, time.monotonic() - started)
            artifact_writer.write_manifest(directory, facts | {"record": record}, files)


def find_records(target: TargetSpec, records: str | None) -> Lookup:
    """In `records` first, then in this user's and the shipped ones; nowhere if that is none."""
    if records == NO_RECORDS:
        return Lookup(target, ())
    if records is not None and not Path(records).is_dir():
        raise BuildError(
            f"records: asked for {records}, which is no directory; "
            f"possible: what compiler.tune --records was given, or {NO_RECORDS}"
        )
    return Lookup(target, ((Path(records),) if records else ()) + default_roots())


def artifact_name(model: ModelConfig) -> str:
    """The model's name, as a file may be called."""
    return re.sub(r"[^\w.-]+", "-", model.name)


def describe(model: ModelConfig, target: TargetSpec, kv_bits: list[int]) -> dict[str, object]:
    rows = {"prompt_rows": target.prompt_rows} if isinstance(target, GpuTarget) else {}
    return {
        "model": artifact_name(model),
        "target": target.name,
        **target.needs(),
        **rows,
        "kv_bits": kv_bits,
        "default_kv_bits": model.kv_bits if model.kv_bits in kv_bits else 16,
        "context_length": model.max_position_embeddings,
        **levels(model, target, kv_bits),
    }


def levels(model: ModelConfig, target: TargetSpec, kv_bits: list[int]) -> dict[str, object]:
    """Of each kv_bits, what attention unpacks of a cache before a prompt: some GPUs' kernels do."""
    kernels = find_module("attention", default_choice("attention", target.families).family)
    if not hasattr(kernels, "levels"):
        return {}
    heads = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    return {"levels": {str(bits): kernels.levels(*heads, bits) for bits in kv_bits}}


def build_record(target: TargetSpec, kernels: KernelTable, seconds: float) -> dict[str, object]:
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "tvm_target": target.tvm,
        "seconds": round(seconds, 1),
        "kernels": kernels.record,
    }


def read_tensor(weights: IntegerWeights, name: str) -> np.ndarray:
    """One tensor; what torch or safetensors say of a bad one becomes one line."""
    try:
        return weights[name]
    except CheckpointError:
        raise
    except (ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BuildError(f"checkpoint: cannot read {name}: {reason[0]}") from error
