"""The choice of kernels: the best family that exists, each kernel built once, all recorded."""

import pytest
import tvm
from dialect_calls import CASES
from tvm import relax

from compiler.kernels import find_schedule, using
from schedules.targets import TARGETS, CpuTarget

CPUS = [name for name, spec in TARGETS.items() if isinstance(spec, CpuTarget)]


def legalized(target: str, *names: str) -> tuple[tvm.IRModule, list[dict]]:
    with using(TARGETS[target]) as table:
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
    assert record == [
        {"op": "rms_norm_int4", "shape": {"K": 48, "eps": 1e-5}, "family": "generic"},
        {"op": "int8_matmul", "shape": {"K": 48, "N": 64}, "family": "generic"},
    ]


@pytest.mark.parametrize("target", CPUS)
def test_family_is_the_first_that_has_a_schedule(target):
    _, record = legalized(target, "int8_matmul")
    assert record[0]["family"] == find_schedule("int8_matmul", TARGETS[target].families)[0]


def test_schedule_that_does_not_exist():
    with pytest.raises(NotImplementedError, match=r"vax_matmul: no schedule in schedules/vax_mat"):
        find_schedule("vax_matmul", ("avx2", "generic"))


def test_unpacked_weight_is_refused():
    with pytest.raises(
        TypeError, match=r"w is int8 \(64, 48\), expected uint8 .* of rows_2bit, as"
    ):
        legalized("generic", "ternary_matmul")


def test_updates_in_place():
    module, _ = legalized("generic", "kv_append")
    assert "R.call_tir_inplace(" in module["f0"].script()
