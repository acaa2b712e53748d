"""The pipeline: the flat list of passes from the exported module to the virtual machine's."""

from collections.abc import Sequence
from pathlib import Path

import tvm
from tvm.relax import transform
from tvm.ir.transform import Pass

from compiler.passes.dump_ir import dump_ir
from compiler.passes.pack_weights import pack_weights
from compiler.passes.schedule_stock_ops import schedule_stock_ops
from compiler.passes.specialize_kv_cache import specialize_kv_cache


def passes(kv_bits: Sequence[int], dump_directory: Path | None = None) -> list[Pass]:
    """In order. To be run with a target in force (`compiler.kernels.using`)."""

    def dump(name: str) -> list[Pass]:
        return [dump_ir(dump_directory, name)] if dump_directory else []

    return [
        *dump("0-exported"),
        # Phase 1: the dialect, for this target and these caches
        pack_weights,
        specialize_kv_cache(kv_bits),
        *dump("1-specialized"),
        # Phase 2: every dialect call becomes a call of its kernel, stock ops become loops
        transform.LegalizeOps(),
        *dump("2-legalized"),
        # Phase 3: the stock ops among themselves; dialect kernels are opaque
        transform.AnnotateTIROpPattern(),
        transform.FuseOps(),
        transform.FuseTIR(),
        schedule_stock_ops,
        *dump("3-scheduled"),
        # Phase 4: memory
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        *dump("4-planned"),
        # Phase 5: the virtual machine's own calls
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
        *dump("5-lowered"),
    ]


def lower(mod: tvm.IRModule, kv_bits: Sequence[int], dump_directory: Path | None = None):
    with tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(passes(kv_bits, dump_directory))(mod)
