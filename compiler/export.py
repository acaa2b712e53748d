"""export: the torch module of model/integer.py as a Relax module of dialect calls.

    prefill(tokens i64[m], slots i64[m], positions i64[m], rows i64[r], caches, params) -> f32[r, V]
    decode (tokens i64[m], slots i64[m], positions i64[m],              caches, params) -> f32[m, V]

`caches` and `params` are tuples; m, r, slots s and the size b of a cache's last axis are symbols.
Tensors stay on torch's meta device: exporting a 2B model reads and holds no weights.
"""

from collections.abc import Callable

import torch
import tvm
from torch.export import Dim, ExportedProgram
from torch.fx import Node
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from compiler.op import OpDef
from compiler.ops import OPS
from compiler.passes.bundle_inputs import bundle_inputs
from model.config import ModelConfig
from model.integer import Decode, IntegerModel, Prefill

EXPORT_KV_BITS = 16  # possible for every head size; SpecializeKVCache makes the other ones
FIRST = ("embed.table", "embed.scale", "head.table", "head.scale", "rope.cos", "rope.sin")
LAYER = (
    *("attn_norm", "qkv.w", "qkv.scale", "attn_sub_norm", "o.w", "o.scale"),
    *("ffn_norm", "gate.w", "gate.scale", "up.w", "up.scale", "ffn_sub_norm"),
    *("down.w", "down.scale"),
)
LAST = ("norm",)
# Example sizes of the symbols. Above 1, which torch would take for constants, and all different.
ROWS, WANTED, SLOTS, CONTEXT = 7, 5, 3, 11


class _Functional(torch.nn.Module):
    """A step with its weights as an argument, so that none is stored in the exported program."""

    def __init__(self, step: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self._step = (step,)  # in a tuple, out of torch's sight
        self._names = [f"model.{name}" for name in names]

    def forward(self, inputs: list, caches: list, params: list) -> torch.Tensor:
        named = dict(zip(self._names, params, strict=True))
        logits, _ = torch.func.functional_call(self._step[0], named, (*inputs, caches))
        return logits  # the caches are updated in place once compiled


def parameters(config: ModelConfig) -> dict[str, torch.Tensor]:
    """The parameters of the compiled functions in their order, as meta tensors."""
    with torch.device("meta"):
        return _in_order(IntegerModel(config))


def _in_order(model: IntegerModel) -> dict[str, torch.Tensor]:
    buffers = dict(model.named_buffers())
    layers = [f"layers.{i}.{name}" for i in range(len(model.layers)) for name in LAYER]
    names = [name for name in (*FIRST, *layers, *LAST) if name in buffers]
    assert len(names) == len(buffers), buffers.keys() - set(names)
    return {name: buffers[name] for name in names}


def export_model(config: ModelConfig) -> tvm.IRModule:
    """Functions `prefill` and `decode` at EXPORT_KV_BITS; attribute `param_names` of the module."""
    with torch.device("meta"):
        model = IntegerModel(config)
    steps: dict[str, tuple[Prefill | Decode, tuple[str, ...]]] = {
        "prefill": (Prefill(model, EXPORT_KV_BITS), ("tokens", "slots", "positions", "rows")),
        "decode": (Decode(model, EXPORT_KV_BITS), ("tokens", "slots", "positions")),
    }
    layers = range(config.num_hidden_layers)
    caches = [f"layers.{i}.{part}" for i in layers for part in ("codes", "scales")]
    params = list(_in_order(model))
    module = tvm.IRModule({})
    for name, (step, inputs) in steps.items():
        imported = import_program(trace(step, inputs))
        bundled = bundle_inputs(imported["main"], inputs, caches, params)
        module[name] = bundled.with_attr("global_symbol", name)
    return module.with_attr("param_names", params)


def trace(step: Prefill | Decode, input_names: tuple[str, ...]) -> ExportedProgram:
    """torch.export over meta tensors, flat: inputs, then caches, then parameters."""
    rows, wanted, slots, size = (Dim(name) for name in ("m", "r", "s", "b"))
    params = _in_order(step.model)
    with torch.device("meta"):
        inputs = [
            torch.empty(WANTED if name == "rows" else ROWS, dtype=torch.int64)
            for name in input_names
        ]
        caches = step.model.empty_caches(EXPORT_KV_BITS, SLOTS, CONTEXT)
    shapes = (
        [{0: wanted if name == "rows" else rows} for name in input_names],
        [{0: slots} if i % 2 else {0: slots, 3: size} for i in range(len(caches))],
        [None] * len(params),
    )
    arguments = (inputs, caches, list(params.values()))
    functional = _Functional(step, list(params))
    return torch.export.export(functional, arguments, dynamic_shapes=shapes, strict=False)


def import_program(program: ExportedProgram) -> tvm.IRModule:
    """The exported graph in Relax: `bitnet::<op>` one to one, the few others by TVM's importer."""
    converters = {f"{name}.default": _converter(op) for name, op in OPS.items()}
    return from_exported_program(
        program,
        unwrap_unit_return_tuple=True,
        run_ep_decomposition=False,  # it would trace the graph once more and change nothing here
        custom_convert_map=converters | {"index.Tensor": _convert_index},
    )


def _converter(op: OpDef) -> Callable[[Node, object], relax.Var]:
    names = [*(arg.name for arg in op.tensors), *op.statics]

    def convert(node: Node, importer) -> relax.Var:
        values = dict(zip(names, node.args, strict=False)) | node.kwargs
        args = [importer.env[v] if isinstance(v, Node) else v for v in values.values()]
        return importer.block_builder.emit(op(*args), op.name)

    return convert


def _convert_index(node: Node, importer) -> relax.Var:
    """x[rows]. The importer's own gather reads out of bounds where an index is."""
    x, indices = node.all_input_nodes
    gather = relax.op.take(importer.env[x], importer.env[indices], axis=0, mode="clip")
    return importer.block_builder.emit(gather)
