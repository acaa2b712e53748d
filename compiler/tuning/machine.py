"""Machine: what a tuning record is of, and how alike two machines are.

    directory of records = ROOT/<target row>/<machine>/        <machine>: `Machine.slug`

A record is exact on a machine of the same processor, flags, number of threads and version of TVM;
it is "nearest" on another machine of the same row and version.
"""

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from schedules.targets import GpuTarget, TargetSpec, host_flags

# Fields of /proc/cpuinfo that tell processors apart: x86's, ARM's
CPU_FIELDS = (
    *("vendor_id", "cpu family", "model", "model name"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part"),
)
LLC_BYTES_UNKNOWN = 32 * 2**20


@dataclass(frozen=True)
class Machine:
    processor: str  # the CPU's identity, or the GPU's name and arch
    flags: tuple[str, ...]  # of the CPU, sorted
    threads: int  # that kernels were measured with
    tvm: str  # version

    @property
    def slug(self) -> str:
        """A directory's name: readable, and different for different machines."""
        name = re.sub(r"\(\w+\)|\W+", " ", self.processor).lower()
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{'-'.join(name.split())[:40].strip('-')}-{self.threads}t-{digest[:8]}"

    @classmethod
    def from_dict(cls, values: Mapping) -> "Machine":
        """KeyError or TypeError where `values` are not those of a machine."""
        return cls(
            str(values["processor"]),
            tuple(map(str, values["flags"])),
            int(values["threads"]),
            str(values["tvm"]),
        )

    def likeness(self, other: "Machine") -> tuple[bool, float, bool]:
        """Rises with how alike they are: processor, share of common flags, threads."""
        flags = set(self.flags), set(other.flags)
        common = len(flags[0] & flags[1]) / max(1, len(flags[0] | flags[1]))
        return self.processor == other.processor, common, self.threads == other.threads


def tvm_version() -> str:
    return importlib.metadata.version("apache-tvm")


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def this_machine(target: TargetSpec, threads: int | None = None) -> Machine:
    """The machine that a build for `target` here is for, as far as this host can tell."""
    if isinstance(target, GpuTarget):
        return Machine(f"{gpu_name()} {' '.join(target.archs)}", (), 1, tvm_version())
    flags = tuple(sorted(host_flags()))
    return Machine(cpu_identity(), flags, threads or usable_cpus(), tvm_version())


def remote_machine(key: str, threads: int) -> Machine:
    """A machine behind RPC is called by its key: its server says no more of it."""
    return Machine(f"rpc {key}", (), threads, tvm_version())


def gpu_name() -> str:
    import tvm

    device = tvm.cuda(0)
    return str(device.device_name) if device.exist else "no GPU"


def cpu_identity(path: Path = Path("/proc/cpuinfo")) -> str:
    found: dict[str, str] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in CPU_FIELDS:
                found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return " ".join(found[field] for field in CPU_FIELDS if field in found) or "unknown"


def last_level_cache_bytes() -> int:
    """Of the first CPU; a guess where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]])
    return max(sizes, default=LLC_BYTES_UNKNOWN)
