"""DrawToken: on a GPU, a step of one row that brings a token to the host, and nothing else.

    decode_token_kv3(request i64[8], reply i64[1], caches, params) -> (reply, logits f32[1, V])

    token, slot, position, temperature, ... = request      schedules/request/
    logits = the body of decode_one_kv3, or decode_kv3 of one row
    reply = a token, drawn where the logits are             schedules/sample/

`request` and `reply` are memory of the host that the GPU reads and writes (runtime/mailbox.py), so
that a token costs no copy and no launch but the step's. `reply` below 0: the host draws from the
logits, with runtime/sampler.py, which a CPU always does.
"""

import tvm
from tvm import relax

from compiler.kernels import in_force
from compiler.passes.specialize_one_row import MANY, ONE, bind_rows
from schedules.request.cuda import FIELDS, WORDS
from schedules.request.cuda import kernel as request_kernel
from schedules.sample.cuda import GROUPS
from schedules.sample.cuda import kernel as sample_kernel
from schedules.targets import GpuTarget

DRAWN = "decode_token_kv"
OPAQUE = {"op_pattern": 8}
NEW = -1


@tvm.transform.module_pass(opt_level=0, name="DrawToken")
def draw_token(mod: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    target = in_force().target
    if not isinstance(target, GpuTarget):
        return mod
    names = {gv.name_hint for gv, func in mod.functions_items() if isinstance(func, relax.Function)}
    drawn = sorted(name.removeprefix(MANY) for name in names if name.startswith(MANY))
    steps = {
        bits: mod[ONE + bits] if ONE + bits in names else bind_rows(mod[MANY + bits])
        for bits in drawn
    }
    if not steps:
        return mod
    builder = relax.BlockBuilder(mod)
    vocab = int(next(iter(steps.values())).ret_ty.shape[1])
    request, sample = (
        builder.add_func(func.with_attrs(OPAQUE | {"global_symbol": name}), name)
        for name, func in (
            ("request", request_kernel(target)),
            ("sample", sample_kernel(vocab, target)),
        )
    )
    for bits, step in steps.items():
        add_drawn(builder, DRAWN + bits, step, request, sample)
    return builder.finalize()


def add_drawn(
    builder: relax.BlockBuilder,
    name: str,
    step: relax.Function,
    request: tvm.ir.GlobalVar,
    sample: tvm.ir.GlobalVar,
) -> None:
    """`step` between a request and a reply."""
    asked = relax.Var("request", relax.TensorType([WORDS], "int64"))
    reply = relax.Var("reply", relax.TensorType([1], "int64"))
    types = [relax.TensorType([1], dtype) for dtype in FIELDS.values()]
    results = [reply.ty, relax.TensorType([1, GROUPS], "int64")]
    own = relax.utils.copy_with_new_vars(step)
    with builder.function(name, [asked, reply, *own.params[3:]]):
        with builder.dataflow():
            found = builder.emit(relax.call_tir(request, [asked], types))
            fields = [builder.emit(relax.TupleGetItem(found, i)) for i in range(len(types))]
            row = dict(zip(own.params[:3], fields[:3], strict=True))
            logits = builder.emit(builder.normalize(own.bind_params(row).body))
            arguments = [logits, *fields[3:], reply]
            inplace = [len(arguments) - 1, NEW]
            call = relax.op.call_tir_inplace(sample, arguments, inplace, results)
            told = builder.emit(relax.TupleGetItem(builder.emit(call), 0))
            result = builder.emit_output(relax.Tuple([told, logits]))
        builder.emit_func_output(result)
