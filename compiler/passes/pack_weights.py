"""PackWeights: give every ternary parameter the layout that the chosen kernel reads.

    params[i]: i8[N, K]  ->  u8[packed shape]

The module's attribute `layouts` then maps the parameter's name to its layout; the build packs the
checkpoint's tensors by it. Only parameters are packed, and each in one layout.
"""

import tvm
from tvm import relax

from compiler.kernels import in_force
from compiler.ops import find_op
from compiler.rebuild import rebuild
from schedules.layouts import LAYOUTS


@tvm.transform.module_pass(opt_level=0, name="PackWeights")
def pack_weights(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    names = [str(name) for name in mod.attrs["param_names"]]
    layouts: dict[int, str] = {}
    for _, func in mod.functions_items():
        for index, layout in choose_layouts(func).items():
            if layouts.setdefault(index, layout) != layout:
                raise ValueError(
                    f"{names[index]}: one kernel reads {layouts[index]}, another {layout}"
                )
    packed = {name: retype(func, layouts) for name, func in mod.functions_items()}
    table = {names[index]: layout for index, layout in sorted(layouts.items())}
    return tvm.IRModule(packed, attrs=mod.attrs).with_attr("layouts", table)


def choose_layouts(func: relax.Function) -> dict[int, str]:
    """Index in `params` -> layout, for the weights of a function's dialect calls."""
    table = in_force()
    value_of = {b.var: b.value for block in func.body.blocks for b in block.bindings}
    layouts = {}
    for value in value_of.values():
        op = find_op(value) if isinstance(value, relax.Call) else None
        if op is None or op.weight is None:
            continue
        weight = value_of.get(value.args[op.argument_names.index(op.weight)])
        if not isinstance(weight, relax.TupleGetItem):
            raise ValueError(f"{op.name}: {op.weight} is not a parameter, so it cannot be packed")
        statics = op.static_values(value)
        layouts[weight.index] = op.weight_layout(op.match(value), statics, table).name
    return layouts


def retype(func: relax.Function, layouts: dict[int, str]) -> relax.Function:
    (params,) = (param for param in func.params if param.name == "params")
    fields = list(params.ty.fields)
    for index, layout in layouts.items():
        n, k = (int(size) for size in fields[index].shape)
        fields[index] = relax.TensorType(LAYOUTS[layout].packed_shape(n, k), "uint8")
    return rebuild(func, {"params": relax.TupleType(fields)})
