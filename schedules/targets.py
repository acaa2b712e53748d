"""Targets: one row per machine the compiler builds for.

Kernels read facts (`vector_bits`, `l2_bytes`, `num_multiprocessors`); no file outside this one
looks at a target's name, kind or mcpu. Adding a machine is adding a row.
"""

import ctypes
import platform
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cache

from tvm.target import Target


@dataclass(frozen=True)
class TargetSpec:
    name: str  # the --target spelling
    families: tuple[str, ...]  # kernel families that run here, the best first
    tvm: dict = field(hash=False)  # passed to tvm.target.Target unchanged

    def to_tvm(self) -> Target:
        return Target(self.tvm)

    def needs(self) -> dict[str, object]:
        """What a host must have to run the build, as artifact.json says it."""
        raise NotImplementedError

    def runs_here(self) -> bool:
        """Whether this host can run the build."""
        raise NotImplementedError


@dataclass(frozen=True)
class CpuTarget(TargetSpec):
    vector_bits: int
    num_vector_registers: int
    l1d_bytes: int  # of one core
    l2_bytes: int  # of one core
    machine: str = ""  # `uname -m` of a host that runs the build; "" is that of the build's host
    cpu_flags: tuple[str, ...] = ()  # /proc/cpuinfo flags that a host needs to run the build
    is_board: bool = False  # one CPU by name; `native` takes a row of an instruction set

    def __post_init__(self):
        assert self.families and self.families[-1] == "generic", f"{self.name}: generic is last"
        assert self.vector_bits % 64 == 0 and self.l1d_bytes < self.l2_bytes, self.name

    def lanes(self, bits: int) -> int:
        """Elements of `bits` width in one vector register."""
        return self.vector_bits // bits

    def needs(self) -> dict[str, object]:
        machine = self.machine or platform.machine()
        return {"device": "cpu", "machine": machine, "cpu_flags": list(self.cpu_flags)}

    def runs_here(self) -> bool:
        return self.machine in ("", platform.machine()) and set(self.cpu_flags) <= host_flags()


@dataclass(frozen=True)
class GpuTarget(TargetSpec):
    archs: tuple[str, ...]  # nvcc's names; several make a fat build
    num_multiprocessors: int  # what grids are balanced for
    shared_bytes: int  # of one block, opted in
    l2_bytes: int
    has_int4_units: bool  # mma of s4 is an instruction of every arch
    warp_lanes: int = 32
    prompt_rows: int = 2048  # of a step: tiles for all multiprocessors, 0.1 MB of a 2B model each
    step_rows: int = 256  # of any other step, which is captured

    @property
    def can_launch_early(self) -> bool:
        """Whether every arch has programmatic dependent launch: compute capability 9.0 on."""
        return all(capability_of(arch) >= (9, 0) for arch in self.archs)

    def needs(self) -> dict[str, object]:
        machine = platform.machine()  # of the host code beside the kernels
        return {"device": "cuda", "machine": machine, "cpu_flags": [], "archs": list(self.archs)}

    def runs_here(self) -> bool:
        return compute_capability() in [capability_of(arch) for arch in self.archs]


def capability_of(arch: str) -> tuple[int, int]:
    """(9, 0) of sm_90a."""
    digits = arch.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1])


def gpu(
    name: str,
    archs: tuple[str, ...],
    num_multiprocessors: int,
    shared_kib: int,
    l2_mib: int,
    families: tuple[str, ...] = ("sm80", "cuda"),
    has_int4_units: bool = False,
) -> GpuTarget:
    """A row for CUDA. TVM is told the first arch: only nvcc, which gets all, uses it."""
    tvm = {
        "kind": "cuda",
        "arch": archs[0],
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": shared_kib * 1024,
        "thread_warp_size": 32,
        "host": {"kind": "llvm"},
    }
    return GpuTarget(
        name=name,
        families=families,
        tvm=tvm,
        archs=archs,
        num_multiprocessors=num_multiprocessors,
        shared_bytes=shared_kib * 1024,
        l2_bytes=l2_mib * 2**20,
        has_int4_units=has_int4_units,
    )


X86_V3 = ("avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")
X86_VNNI = (*X86_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni")
X86_VBMI = (*X86_VNNI, "avx512vbmi")
X86_ZEN4 = (*X86_VBMI, "avx512_bf16", "sse4a")  # Ice Lake lacks the one, Intel's all the other


def x86(
    name: str,
    families: tuple[str, ...],
    cpu_flags: tuple[str, ...],
    llvm: dict[str, object],
    vector_bits: int,
    l1d_kib: int,
    l2_kib: int,
) -> CpuTarget:
    """A row for x86-64; caches are those of one core, of the smallest that has the flags."""
    return CpuTarget(
        name=name,
        families=(*families, "generic"),
        tvm={"kind": "llvm", **llvm},
        vector_bits=vector_bits,
        num_vector_registers=16 if vector_bits < 512 else 32,
        l1d_bytes=l1d_kib * 1024,
        l2_bytes=l2_kib * 1024,
        machine="x86_64",
        cpu_flags=cpu_flags,
    )


# What /proc/cpuinfo calls the features of each ARM level, every level with those before it
ARM_NEON = ("asimd",)
ARM_DOTPROD = (*ARM_NEON, "asimddp")
ARM_I8MM = (*ARM_DOTPROD, "i8mm")
ARM_SVE2 = (*ARM_I8MM, "sve", "sve2")
ARM_8_2 = ("asimdhp", "asimdrdm", "atomics", "crc32", "lrcpc")  # of every core named below


def arm(
    name: str,
    cpu_flags: tuple[str, ...],
    llvm: dict[str, object],
    l1d_kib: int = 32,
    l2_kib: int = 128,
    is_board: bool = False,
) -> CpuTarget:
    """A row for arm64 Linux. The families follow from the flags; caches are those of one core, by
    default of the smallest that has the flags (Cortex-A53, A55, A510: a share of a common L2)."""
    levels = {"i8mm": ARM_I8MM, "dotprod": ARM_DOTPROD, "neon": ARM_NEON}
    families = [level for level, flags in levels.items() if set(flags) <= set(cpu_flags)]
    return CpuTarget(
        name=name,
        families=(*families, "generic"),
        tvm={"kind": "llvm", "mtriple": "aarch64-linux-gnu", **llvm},
        vector_bits=128,
        num_vector_registers=32,
        l1d_bytes=l1d_kib * 1024,
        l2_bytes=l2_kib * 1024,
        machine="aarch64",
        cpu_flags=cpu_flags,
        is_board=is_board,
    )


def arm_board(
    name: str, mcpu: str, cpu_flags: tuple[str, ...], l1d_kib: int, l2_kib: int
) -> CpuTarget:
    """A row that differs from its instruction set's in what LLVM knows of the core, and caches."""
    return arm(name, cpu_flags, {"mcpu": mcpu}, l1d_kib, l2_kib, is_board=True)


TARGETS: dict[str, TargetSpec] = {
    spec.name: spec
    for spec in (
        # Whatever LLVM takes for the baseline of the host's architecture; on x86-64, SSE2.
        CpuTarget(
            name="generic",
            families=("generic",),
            tvm={"kind": "llvm"},
            vector_bits=128,
            num_vector_registers=16,
            l1d_bytes=32 * 1024,
            l2_bytes=256 * 1024,
        ),
        # Levels and their flags: https://gitlab.com/x86-psABIs/x86-64-ABI (cpuinfo says abm
        # for lzcnt). Caches: the smallest of Haswell (32 KiB, 256 KiB) and Zen (32, 512).
        x86("x86-avx2", ("avx2",), X86_V3, {"mcpu": "x86-64-v3"}, 256, 32, 256),
        # AMD's Zen 1 to 3: AVX2's kernels, asking for memory as Zen 4 wants it. Timed on a Zen 4,
        # not on one of these. Tiled as above: for 512 KiB prompts took 1.04 of the time.
        x86("x86-zen", ("zen", "avx2"), (*X86_V3, "sse4a"), {"mcpu": "x86-64-v3"}, 256, 32, 256),
        # Alder Lake and later without AVX-512. LLVM itself makes `vpdpwssd` of products and sums.
        # Caches: Gracemont (32, a quarter of 2048)
        x86(
            "x86-avxvnni",
            ("avxvnni", "avx2"),
            (*X86_V3, "avx_vnni"),
            {"mcpu": "x86-64-v3", "mattr": ["+avxvnni"]},
            256,
            32,
            512,
        ),
        # Cascade Lake (32, 1024), tiled for half of that L2, as the rows below
        x86(
            "x86-avx512vnni",
            ("avx512vnni", "avx2"),
            X86_VNNI,
            {"mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]},
            512,
            32,
            512,
        ),
        # Ice Lake, Tiger Lake (48, 512 and more)
        x86(
            "x86-avx512vbmi",
            ("avx512vbmi", "avx512vnni", "avx2"),
            X86_VBMI,
            {"mcpu": "x86-64-v4", "mattr": ["+avx512vnni", "+avx512vbmi"]},
            512,
            32,
            512,
        ),
        # Zen 4 and later (32, 1024): the kernels of the row above, memory asked for otherwise
        x86(
            "x86-zen4",
            ("zen4", "avx512vbmi", "avx512vnni", "avx2"),
            X86_ZEN4,
            {"mcpu": "x86-64-v4", "mattr": ["+avx512vnni", "+avx512vbmi"]},
            512,
            32,
            512,
        ),
        # Sapphire Rapids and later: 48 KiB, 2 MiB
        x86(
            "x86-amx",
            ("amxvbmi", "amx", "avx512vbmi", "avx512vnni", "avx2"),
            (*X86_VBMI, "amx_tile", "amx_int8"),
            {
                "mcpu": "x86-64-v4",
                "mattr": ["+avx512vnni", "+avx512vbmi", "+amx-tile", "+amx-int8"],
            },
            512,
            48,
            2048,
        ),
        # Features: https://developer.arm.com/documentation/109697 (A-profile feature names)
        arm("arm-neon", ARM_NEON, {"mattr": ["+neon"]}),
        arm("arm-dotprod", ARM_DOTPROD, {"mattr": ["+neon", "+dotprod"]}),
        arm("arm-i8mm", ARM_I8MM, {"mattr": ["+neon", "+dotprod", "+i8mm"]}),
        # LLVM uses SVE2 in the loops that it vectorises. The kernels' own vectors are NEON's:
        # every core with SVE2 today has 128-bit registers for both.
        arm("arm-sve2", ARM_SVE2, {"mattr": ["+neon", "+dotprod", "+i8mm", "+sve2"]}),
        arm_board("arm-pi4", "cortex-a72", (*ARM_NEON, "crc32"), 32, 256),
        arm_board("arm-pi5", "cortex-a76", (*ARM_DOTPROD, *ARM_8_2), 64, 512),
        # ARMv8.2 phones since 2018: scheduled for the in-order little core, where it matters most
        arm_board("arm-phone", "cortex-a55", (*ARM_DOTPROD, *ARM_8_2), 32, 128),
        arm_board("arm-graviton3", "neoverse-v1", (*ARM_I8MM, *ARM_8_2, "bf16", "sve"), 64, 1024),
        arm_board("arm-graviton4", "neoverse-v2", (*ARM_SVE2, *ARM_8_2, "bf16"), 64, 2048),
        # Under Linux; M1 has no i8mm. L2 is a performance core's share.
        arm_board("arm-apple-m1", "apple-m1", (*ARM_DOTPROD, *ARM_8_2), 128, 3072),
        arm_board("arm-apple-m2", "apple-m2", (*ARM_I8MM, *ARM_8_2, "bf16"), 128, 4096),
        # Multiprocessors and L2 of the arch's best-known chip; shared memory a block may opt in.
        # https://docs.nvidia.com/cuda/cuda-c-programming-guide/#compute-capabilities
        gpu("cuda-sm80", ("sm_80",), 108, 163, 40, has_int4_units=True),  # A100
        gpu("cuda-sm86", ("sm_86",), 84, 99, 6, has_int4_units=True),  # A40, RTX 3090
        gpu("cuda-sm89", ("sm_89",), 142, 99, 96, has_int4_units=True),  # L40, RTX 4090
        gpu("cuda-sm90", ("sm_90a",), 132, 227, 50, families=("sm90", "cuda")),  # H100, H200
        gpu("cuda-sm100", ("sm_100",), 148, 227, 126),  # B200
        # What `cuda` means where no GPU is: one library for all of the above, in kernels that suit
        # all: INT4 as bytes, since s4 is emulated from sm_90 on
        gpu("cuda-fat", ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100"), 108, 99, 6),
    )
}


FP4_ARCH = "sm_100"  # multiplies E2M1: by tcgen05 alone; mma.sync of it needs sm_120


def detect_native(machine: str, cpu_flags: Collection[str]) -> CpuTarget:
    """The CPU's row with the widest vectors among those that such a host can run."""
    cpus = [spec for spec in TARGETS.values() if isinstance(spec, CpuTarget)]
    rows = [spec for spec in cpus if not spec.is_board]
    possible = [
        row for row in rows if row.machine in ("", machine) and set(row.cpu_flags) <= set(cpu_flags)
    ]
    return max(possible, key=lambda row: (row.vector_bits, len(row.cpu_flags)))


def cpus_here() -> list[CpuTarget]:
    """The rows of CPUs that this host runs."""
    return [row for row in TARGETS.values() if isinstance(row, CpuTarget) and row.runs_here()]


def host_flags() -> frozenset[str]:
    """Flags of /proc/cpuinfo; empty where there is none, which leaves the generic target."""
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return frozenset()


@cache
def compute_capability() -> tuple[int, int] | None:
    """Of the first GPU, as its driver says; None where there is no driver or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    major, minor, device = ctypes.c_int(), ctypes.c_int(), 0
    if driver.cuInit(0) or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device):
        return None
    if driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device):
        return None
    return major.value, minor.value


def detect_gpu(capability: tuple[int, int] | None) -> TargetSpec:
    """The row for a GPU of this compute capability; without a GPU or a row, the build for all
    archs: machine code of one serves later minor versions, PTX of the last one later chips."""
    fat = TARGETS["cuda-fat"]
    if capability is None:
        return fat
    assert isinstance(fat, GpuTarget)
    oldest = min(map(capability_of, fat.archs))
    if capability < oldest:
        raise ValueError(
            f"target: asked for cuda, found a GPU of compute capability "
            f"{capability[0]}.{capability[1]}; possible: {oldest[0]}.{oldest[1]} or later, or "
            "--target native, which builds for this CPU"
        )
    return TARGETS.get(f"cuda-sm{capability[0]}{capability[1]}", fat)


def why_cuda(found: TargetSpec) -> str:
    """What `cuda` turned out to mean here, in words."""
    needs = found.needs()["archs"]
    assert isinstance(needs, list)
    here = compute_capability()
    gpu = "no GPU here" if here is None else f"a GPU of compute capability {here[0]}.{here[1]} here"
    if here is not None and not found.runs_here():
        gpu += ", which has no row of its own"
    return f"{gpu}, building {found.name} for {', '.join(needs)}"


def why_not_fp4(target: TargetSpec) -> str | None:
    """What becomes of FP4 activations on GPUs that multiply FP4; None where none does."""
    if not isinstance(target, GpuTarget) or FP4_ARCH not in target.archs:
        return None
    return (
        f"fp4: activations run as INT8 codes of twice the grid, which is exact; the FP4 units of "
        f"{FP4_ARCH} are not used: they sum in float32 in an order and width that is not specified"
    )


def find(name: str) -> TargetSpec:
    """The row called `name`; 'native' is the best one for this CPU, 'cuda' the one for this GPU."""
    if name == "native":
        return detect_native(platform.machine(), host_flags())
    if name == "cuda":
        return detect_gpu(compute_capability())
    if name not in TARGETS:
        possible = ", ".join([*TARGETS, "native", "cuda"])
        raise ValueError(f"target: asked for {name!r}; possible: {possible}")
    return TARGETS[name]
