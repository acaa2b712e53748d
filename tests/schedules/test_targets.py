"""Rows, and the choice of one for a host."""

import pytest

from schedules import targets
from schedules.targets import (
    TARGETS,
    CpuTarget,
    detect_gpu,
    detect_native,
    find,
    why_cuda,
    why_not_fp4,
)

AVX2_HOST = ["sse2", "avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"]
AVX512_HOST = [*AVX2_HOST, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]
VNNI_HOST = [*AVX512_HOST, "avx512_vnni"]
VBMI_HOST = [*VNNI_HOST, "avx512vbmi"]
SAPPHIRE_RAPIDS = [*VBMI_HOST, "avx512_bf16", "avx_vnni"]  # a virtual machine may hide its AMX


@pytest.mark.parametrize(
    "flags, name",
    [
        ([], "generic"),
        (["avx2"], "generic"),
        (AVX2_HOST, "x86-avx2"),
        (AVX512_HOST, "x86-avx2"),
        ([*AVX2_HOST, "sse4a"], "x86-zen"),
        ([*AVX2_HOST, "avx_vnni"], "x86-avxvnni"),
        (VNNI_HOST, "x86-avx512vnni"),
        (VBMI_HOST, "x86-avx512vbmi"),
        ([*VBMI_HOST, "avx512_bf16", "sse4a"], "x86-zen4"),
        (SAPPHIRE_RAPIDS, "x86-avx512vbmi"),
        ([*SAPPHIRE_RAPIDS, "amx_tile", "amx_int8"], "x86-amx"),
    ],
)
def test_detect_native(flags, name):
    assert detect_native("x86_64", flags).name == name


PI_4 = ["fp", "asimd", "evtstrm", "crc32", "cpuid"]
PI_5 = [*PI_4, "atomics", "fphp", "asimdhp", "asimdrdm", "lrcpc", "dcpop", "asimddp"]
GRAVITON_3 = [*PI_5, "sve", "i8mm", "bf16"]


@pytest.mark.parametrize(
    "flags, name",
    [
        (PI_4, "arm-neon"),
        (PI_5, "arm-dotprod"),
        (GRAVITON_3, "arm-i8mm"),
        ([*GRAVITON_3, "sve2"], "arm-sve2"),
    ],
)
def test_native_on_arm_is_an_instruction_set(flags, name):
    assert detect_native("aarch64", flags).name == name


def test_arm_families_follow_from_the_flags():
    assert TARGETS["arm-pi4"].families == ("neon", "generic")
    assert TARGETS["arm-pi5"].families == ("dotprod", "neon", "generic")
    assert TARGETS["arm-graviton4"].families == ("i8mm", "dotprod", "neon", "generic")


def test_find_names_what_is_possible():
    with pytest.raises(ValueError, match=r"asked for 'vax'; possible: generic, x86-avx2.*, native"):
        find("vax")
    assert find("native") in TARGETS.values()


@pytest.mark.parametrize("spec", TARGETS.values(), ids=lambda spec: spec.name)
def test_row(spec):
    assert spec.to_tvm().kind.name == spec.tvm["kind"]
    assert hash(spec)
    if isinstance(spec, CpuTarget):
        assert spec.lanes(8) == spec.vector_bits // 8


@pytest.mark.parametrize(
    "capability, name",
    [
        (None, "cuda-fat"),
        ((9, 0), "cuda-sm90"),
        ((8, 6), "cuda-sm86"),
        ((10, 0), "cuda-sm100"),
        # Of no row: machine code of the minor version before, PTX of the last chip
        ((8, 7), "cuda-fat"),
        ((10, 3), "cuda-fat"),
        ((12, 0), "cuda-fat"),
    ],
)
def test_detect_gpu(capability, name):
    assert detect_gpu(capability).name == name


@pytest.mark.parametrize("capability", [(5, 2), (7, 5)])
def test_detect_gpu_refuses_what_nothing_is_built_for(capability):
    found = "{}\\.{}".format(*capability)
    with pytest.raises(ValueError, match=rf"compute capability {found}; possible: 8\.0 or later"):
        detect_gpu(capability)


def test_a_build_for_all_archs_is_said_aloud(monkeypatch):
    """Also where a GPU is, but no row for it."""
    said = {}
    for capability in (None, (9, 0), (12, 0)):
        monkeypatch.setattr(targets, "compute_capability", lambda found=capability: found)
        said[capability] = why_cuda(detect_gpu(capability))
    assert said[None].startswith("no GPU here, building cuda-fat for sm_80, ")
    assert said[9, 0] == "a GPU of compute capability 9.0 here, building cuda-sm90 for sm_90a"
    assert said[12, 0].startswith(
        "a GPU of compute capability 12.0 here, which has no row of its own, building cuda-fat for "
    )


def test_where_fp4_has_units_that_are_not_used():
    told = {name for name, row in TARGETS.items() if why_not_fp4(row)}
    assert told == {"cuda-sm100", "cuda-fat"}
