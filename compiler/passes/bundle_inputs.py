"""BundleInputs: gather the caches and the parameters of an imported function into two tuples.

    main(tokens, slots, ..., caches_0, ..., params_0, ...)  ->  main(tokens, ..., caches, params)

Fields are bound to variables of their own names, and torch's symbols get those of the
architecture page: m rows, r wanted rows, s slots, b the last axis of the codes.
"""

from collections.abc import Sequence

from tvm import relax, tirx


def bundle_inputs(
    func: relax.Function, inputs: Sequence[str], caches: Sequence[str], params: Sequence[str]
) -> relax.Function:
    func = rename_symbols(func, len(inputs), len(caches))
    last_input, first_param = len(inputs), len(inputs) + len(caches)
    input_vars = [relax.Var(name, var.ty) for name, var in zip(inputs, func.params, strict=False)]
    cache_tuple = _tuple_var("caches", func.params[last_input:first_param])
    param_tuple = _tuple_var("params", func.params[first_param:])
    fields = [
        *((name, relax.TupleGetItem(cache_tuple, i)) for i, name in enumerate(caches)),
        *((name, relax.TupleGetItem(param_tuple, i)) for i, name in enumerate(params)),
    ]
    builder = relax.BlockBuilder()
    with builder.function("main", [*input_vars, cache_tuple, param_tuple]):
        with builder.dataflow():
            bound = [builder.emit(value, name.replace(".", "_")) for name, value in fields]
            arguments = dict(zip(func.params, [*input_vars, *bound], strict=True))
            result = builder.emit_output(builder.normalize(func.bind_params(arguments).body))
        builder.emit_func_output(result)
    return relax.transform.CanonicalizeBindings()(builder.finalize())["main"]


def _tuple_var(name: str, fields: Sequence[relax.Var]) -> relax.Var:
    return relax.Var(name, relax.TupleType([field.ty for field in fields]))


def rename_symbols(func: relax.Function, num_inputs: int, num_caches: int) -> relax.Function:
    shapes = [param.ty.shape for param in func.params]
    found = {"m": shapes[0][0]}
    if num_inputs > 3:
        found["r"] = shapes[3][0]
    if num_caches:
        codes = shapes[num_inputs]
        found |= {"s": codes[0], "b": codes[3]}
    return func.bind_symbolic_vars({old: tirx.Var(name, "int64") for name, old in found.items()})
