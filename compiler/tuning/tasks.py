"""Tasks: the kernels of a model that leave something open, and how much each weighs in it.

A task is an op and its sizes. `calls` says how many times a decode step and a prompt call it; a
kernel is timed at M = 1 for the one and at PROMPT_ROWS for the other (the head, which a prompt
needs for its last row alone, at 1). The weight of a task is the time that its calls take in a mix:

    decode   one step                       prefill   one prompt of PROMPT_ROWS
    both     a prompt and as many steps     (the same number of tokens read and written)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tvm import relax

from compiler.export import export_model
from compiler.kernels import Choice, Make, Schedule, default_choice, key_of
from compiler.op import OpDef, Statics
from compiler.ops import find_op
from compiler.passes.specialize_kv_cache import specialize_kv_cache
from compiler.tuning import space
from compiler.tuning.inputs import MAKERS
from model.config import ModelConfig
from schedules.targets import TargetSpec

Times = Mapping[int, Sequence[float]]  # rows -> seconds, one a round

PROMPT_ROWS = 128
STEPS = {"decode": (1, 0), "prefill": (0, 1), "both": (PROMPT_ROWS, 1)}  # steps, prompts
# Of the columns of a sparse matmul's input, where no TopK says it: a4.8 with 84 % zeros at the
# down_proj input, b1.58 with 22 % (arXiv 2411.04965 table 3, 7B).
ACTIVE = {"a4.8": 0.16, "b1.58": 0.78}


@dataclass
class Task:
    op: OpDef
    sizes: Mapping[str, int | float]
    statics: Statics
    make: Make
    target: TargetSpec
    active: float = 1.0  # share of the columns of q that are not zero
    calls: dict[int, list[int]] = field(default_factory=dict)  # rows -> calls a step, a prompt

    @property
    def key(self) -> tuple:
        return self.op.name, tuple(sorted(self.sizes.items()))

    @property
    def shape(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.sizes.items())

    @property
    def folder(self) -> str:
        return self.op.schedules

    @property
    def default(self) -> Choice:
        return default_choice(self.folder, self.target.families)

    @property
    def size(self) -> int:
        """Points of the space."""
        return space.size(self.folder, self.target)

    def schedule(self, choice: Choice) -> Schedule:
        return Schedule(self.folder, choice)

    def layout(self, choice: Choice) -> str | None:
        """The weights' layout; None where they are not packed."""
        return self.op.layout(self.schedule(choice), self.statics) if self.op.layout else None

    def seconds(self, at: Mapping[int, float], weigh: str) -> float:
        """All calls' time in the mix `weigh`, given one call's at each number of rows."""
        steps, prompts = STEPS[weigh]
        return sum(
            (calls[0] * steps + calls[1] * prompts) * at[rows] for rows, calls in self.calls.items()
        )

    def rows(self, weigh: str) -> list[int]:
        """Numbers of rows that the mix has."""
        return sorted(
            rows for rows in self.calls if self.seconds({r: r == rows for r in self.calls}, weigh)
        )

    def costs(self, times: Times, weigh: str) -> list[float]:
        """Seconds in the mix by each round's times."""
        wanted, unused = self.rows(weigh), dict.fromkeys(self.calls, 0.0)
        rounds = zip(*(times[rows] for rows in wanted), strict=True)
        return [self.seconds(unused | dict(zip(wanted, one, strict=True)), weigh) for one in rounds]


def extract(config: ModelConfig, target: TargetSpec) -> list[Task]:
    """The tasks of a model, in the order of a step; ops that nothing can be chosen of are none."""
    bits = config.kv_bits
    module = specialize_kv_cache([bits])(export_model(config))
    tasks: dict[tuple, Task] = {}
    for place, name in enumerate((f"decode_kv{bits}", f"prefill_kv{bits}")):
        for call, producers in dialect_calls(module[name]):
            op = find_op(call)
            if op is None or op.name not in MAKERS or space.size(op.schedules, target) < 2:
                continue
            match, statics = op.match(call), op.static_values(call)
            sizes = op.sizes(match, statics)
            task = tasks.setdefault(
                key_of(op.name, sizes),
                Task(op, sizes, statics, op.maker(match, statics, target), target),
            )
            if op.name == "sparse_ternary_matmul":
                task.active = active_share(producers, config)
            is_wanted = str(match.dims["M"]) != str(module[name].params[0].ty.shape[0])
            rows = PROMPT_ROWS if place and not is_wanted else 1
            task.calls.setdefault(rows, [0, 0])[place] += 1
    return list(tasks.values())


def allot(trials: int, weights: Mapping[tuple, float], room: Mapping[tuple, int]) -> dict:
    """Trials in proportion to weights, none above its room; what that leaves goes to the others."""
    given = dict.fromkeys(weights, 0)
    while (left := trials - sum(given.values())) > 0:
        open_ = [key for key in weights if given[key] < room[key]]
        if not open_:
            break
        total = sum(weights[key] for key in open_)
        for key in sorted(open_, key=lambda key: weights[key], reverse=True):
            share = max(1, int(left * weights[key] / total))
            given[key] += min(share, room[key] - given[key], trials - sum(given.values()))
    return given


def dialect_calls(function: relax.Function):
    """(call, the calls that its arguments come from) of every dialect op."""
    values = {
        binding.var: binding.value for block in function.body.blocks for binding in block.bindings
    }
    for value in values.values():
        if isinstance(value, relax.Call) and find_op(value):
            yield value, [source(argument, values) for argument in value.args]


def source(argument: relax.Expr, values: Mapping) -> relax.Expr | None:
    """The call that an argument is the result of, or a field of."""
    value = values.get(argument)
    while isinstance(value, relax.TupleGetItem):
        value = values.get(value.tuple_value)
    return value


def active_share(producers: list, config: ModelConfig) -> float:
    """Of the columns that rms_norm_topk_int8 leaves: k of K, or what a trained model leaves."""
    call = next(p for p in producers if isinstance(p, relax.Call) and find_op(p))
    op = find_op(call)
    assert op
    k, columns = op.static_values(call)["k"], op.match(call).static("K")
    return k / columns if k < columns else ACTIVE[config.variant]
