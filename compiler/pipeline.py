"""The pipeline: the flat list of passes from the exported module to the virtual machine's."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import tvm
from tvm.ir.transform import Pass
from tvm.relax import transform
from tvm.runtime import Executable
from tvm.support import cc

from compiler.config import BuildError
from compiler.passes.bound_rows import bound_rows
from compiler.passes.capture_decode import capture_decode
from compiler.passes.draw_token import draw_token
from compiler.passes.drop_checks import drop_checks
from compiler.passes.drop_unread_lists import drop_unread_lists
from compiler.passes.dump_ir import dump_ir
from compiler.passes.fuse_one_row import fuse_one_row
from compiler.passes.fuse_prompts import fuse_prompts
from compiler.passes.launch_early import launch_early
from compiler.passes.pack_weights import pack_weights
from compiler.passes.probe_sparsity import probe_sparsity
from compiler.passes.record_workspace import record_workspace
from compiler.passes.reuse_tensors import reuse_tensors
from compiler.passes.schedule_stock_ops import schedule_stock_ops
from compiler.passes.specialize_kv_cache import specialize_kv_cache
from compiler.passes.specialize_one_row import specialize_one_row
from compiler.toolchain import device_compiler
from schedules.targets import CpuTarget, TargetSpec

LAUNCH = Path(__file__).with_name("launch.c")  # what kernels call for a parallel loop
WORKSPACE = Path(__file__).with_name("workspace.c")  # what they take their buffers from
C_FLAGS = ("-O2", "-pthread")


def passes(kv_bits: Sequence[int], dump_directory: Path | None = None) -> list[Pass]:
    """In order. To be run with a target in force (`compiler.kernels.using`)."""

    def dump(name: str) -> list[Pass]:
        return [dump_ir(dump_directory, name)] if dump_directory else []

    return [
        *dump("0-exported"),
        # Phase 1: the dialect, for this target and these caches
        pack_weights,
        specialize_kv_cache(kv_bits),
        probe_sparsity,
        specialize_one_row,
        fuse_one_row,
        drop_unread_lists,
        fuse_prompts,
        draw_token,
        transform.DeadCodeElimination(),
        *dump("1-specialized"),
        # Phase 2: every dialect call becomes a call of its kernel, stock ops become loops
        transform.LegalizeOps(),
        *dump("2-legalized"),
        # Phase 3: the stock ops among themselves; dialect kernels are opaque
        transform.AnnotateTIROpPattern(),
        transform.FuseOps(),
        transform.FuseTIR(),
        schedule_stock_ops,
        launch_early,
        *dump("3-scheduled"),
        # Phase 4: memory
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        bound_rows,
        transform.StaticPlanBlockMemory(),
        reuse_tensors,
        record_workspace,
        transform.CanonicalizeBindings(),
        capture_decode,
        *dump("4-planned"),
        # Phase 5: the virtual machine's own calls
        transform.LowerAllocTensor(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        drop_checks,
        transform.AttachGlobalSymbol(),
        *dump("5-lowered"),
    ]


def lower(
    mod: tvm.IRModule, kv_bits: Sequence[int], dump_directory: Path | None = None
) -> tvm.IRModule:
    """All passes, for the target in force."""
    with tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(passes(kv_bits, dump_directory))(mod)


def generate(lowered: tvm.IRModule, target: TargetSpec) -> Executable:
    """Machine code for the kernels, the virtual machine's code for the functions."""
    with device_compiler(target):
        return tvm.compile(lowered, target.to_tvm(), relax_pipeline=None)


def sources(target: TargetSpec) -> list[Path]:
    """What is linked into every library, in C. A GPU's keeps TVM's workspaces, of any device."""
    return [LAUNCH, WORKSPACE] if isinstance(target, CpuTarget) else [LAUNCH]


def compile_library(lowered: tvm.IRModule, target: TargetSpec, path: Path, linker: str) -> None:
    """`generate`, and link both into one library."""
    executable = generate(lowered, target)
    link = partial(cc.create_shared, cc=linker, options=[*C_FLAGS, *map(str, sources(target))])
    try:
        executable.export_library(str(path), fcompile=link)
    except RuntimeError as error:  # of create_shared: a title, what the linker printed, its command
        printed = str(error).splitlines()[1:]
        reasons = [line for line in printed if "failed" in line or "error" in line]
        raise BuildError(f"linker: {linker}: {(reasons or printed or [str(error)])[0]}") from error
