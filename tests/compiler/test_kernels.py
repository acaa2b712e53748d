"""The choice of kernels: the best family that exists, each kernel built once, all recorded."""

import pytest
import tvm
from dialect_calls import CASES
from tvm import relax

from compiler import kernels as choosing
from compiler.kernels import Choice, Recorded, Schedule, default_choice, using, version_of
from compiler.ops import OPS
from schedules.int8_matmul import generic
from schedules.targets import TARGETS

GENERIC = TARGETS["generic"]


def legalized(target: str, *names: str, lookup=choosing.no_records):
    """The module and artifact.json's record of the kernels."""
    with using(TARGETS[target], lookup) as table:
        module = tvm.IRModule({})
        for i, name in enumerate(names):
            func = CASES[name].module()["main"]
            module[f"f{i}"] = func.with_attr("global_symbol", f"f{i}")
        return relax.transform.LegalizeOps()(module), table.record


def kernels(module: tvm.IRModule) -> int:
    return sum(isinstance(func, tvm.tirx.PrimFunc) for _, func in module.functions_items())


def test_each_kernel_is_built_once():
    module, record = legalized("generic", "rms_norm_int4", "int8_matmul", "rms_norm_int4")
    assert kernels(module) == 2
    default = {"family": "generic", "knobs": {}, "from": "default"}
    assert record == [
        {"op": "rms_norm_int4", "shape": {"K": 48, "eps": 1e-5}, **default},
        {"op": "int8_matmul", "shape": {"K": 48, "N": 64}, **default},
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_family_is_the_first_that_has_a_schedule(target):
    _, record = legalized(target, "int8_matmul")
    default = default_choice("int8_matmul", TARGETS[target].families)
    assert (record[0]["family"], record[0]["knobs"]) == (default.family, dict(default.knobs))


def test_schedule_that_does_not_exist():
    with pytest.raises(NotImplementedError, match=r"vax_matmul: no schedule in schedules/vax_mat"):
        default_choice("vax_matmul", ("avx2", "generic"))


@pytest.fixture
def knobbed(monkeypatch):
    """int8_matmul's generic kernel with a knob that shows in it."""
    plain = generic.kernel

    def kernel(n, k, target, *, unroll=2):
        if n % unroll:
            raise ValueError(f"unroll is {unroll}, which does not divide {n}")
        return plain(n, k, target).with_attr("unroll", unroll)

    monkeypatch.setattr(generic, "KNOBS", {"unroll": (2, 1, 4, 3)}, raising=False)
    monkeypatch.setattr(generic, "kernel", kernel)


def recorded(knobs: dict[str, int], origin: str = "record", family: str = "generic", n: int = 64):
    """What a record of these knobs says, made by the kernels as they are now."""
    default = Schedule("int8_matmul", default_choice("int8_matmul", GENERIC.families))
    choice = Choice(family, tuple(knobs.items()))
    make = lambda schedule: schedule.kernel(n, 48, GENERIC)  # noqa: E731
    schedule = Schedule("int8_matmul", choice)
    return Recorded(choice, version_of(default, schedule, make, GENERIC.families), origin)


def built(record: list[dict]) -> tuple:
    (entry,) = record
    return entry["family"], entry["knobs"], entry["from"]


def test_recorded_choice_is_built(knobbed):
    module, record = legalized(
        "generic", "int8_matmul", lookup=lambda op, sizes: [recorded({"unroll": 4}, "nearest")]
    )
    assert built(record) == ("generic", {"unroll": 4}, "nearest")
    assert [f.attrs["unroll"] for _, f in module.functions_items() if "unroll" in f.attrs] == [4]


def test_lookup_is_asked_for_the_call(knobbed):
    asked = []
    legalized("generic", "int8_matmul", lookup=lambda *call: asked.append(call) or [])
    assert asked == [("int8_matmul", {"N": 64, "K": 48})]


@pytest.mark.parametrize(
    "knobs, family",
    [
        ({"unroll": 8}, "generic"),
        ({}, "generic"),
        ({"unroll": 4}, "vax"),
        ({}, "foo.bar"),
        ({}, "cuda"),
        ({"unroll": 3}, "generic"),
    ],
    ids=["value", "no knobs", "family", "no module", "another machine's", "refused by the factory"],
)
def test_choice_that_is_none_is_passed_over(knobbed, knobs, family):
    wrong = Recorded(Choice(family, tuple(knobs.items())), "0" * 16, "record")
    good = recorded({"unroll": 1})
    _, record = legalized("generic", "int8_matmul", lookup=lambda *_: [wrong, good])
    assert built(record) == ("generic", {"unroll": 1}, "record")
    _, record = legalized("generic", "int8_matmul", lookup=lambda *_: [wrong])
    assert built(record) == ("generic", {"unroll": 2}, "default")


def test_record_of_another_kernel_is_passed_over(knobbed, monkeypatch):
    """What was measured is not what would be built: the choice, or the default it was against."""
    stale = recorded({"unroll": 4})
    tuned = generic.kernel
    monkeypatch.setattr(generic, "kernel", lambda *a, **k: tuned(*a, **k).with_attr("new", 1))
    with using(GENERIC, lambda *_: [stale]) as table:
        relax.transform.LegalizeOps()(CASES["int8_matmul"].module())
    assert built(table.record) == ("generic", {"unroll": 2}, "default")
    assert table.passed_over == ["int8_matmul"]


def test_weights_are_packed_as_the_chosen_kernel_reads_them():
    """x86-avx2 told to use generic's kernel, whose layout is another."""
    target = TARGETS["x86-avx2"]
    default = Schedule("ternary_matmul", default_choice("ternary_matmul", target.families))
    chosen, families = Schedule("ternary_matmul", Choice("generic")), target.families

    def lookup(op, sizes):
        def make(schedule):
            return schedule.kernel(
                sizes["N"], sizes["K"], sizes["act_bits"], target, epilogue="scale"
            )

        return [Recorded(chosen.choice, version_of(default, chosen, make, families), "record")]

    case = CASES["ternary_matmul"]
    with using(target, lookup) as table:
        op, call = OPS[case.op], case.call()
        layout = op.weight_layout(op.match(call), op.static_values(call), table)
    assert layout.name == chosen.layout(4) != default.layout(4)


def test_unpacked_weight_is_refused():
    with pytest.raises(
        TypeError, match=r"w is int8 \(64, 48\), expected uint8 .* of rows_2bit, as"
    ):
        legalized("generic", "ternary_matmul")


def test_updates_in_place():
    module, _ = legalized("generic", "kv_append")
    assert "R.call_tir_inplace(" in module["f0"].script()
