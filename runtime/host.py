"""Facts about this machine and this process: CPU flags, usable CPUs, memory in bytes."""

import os
import platform
import resource

# What compilers call an extension, where /proc/cpuinfo has another word for it.
CPUINFO_NAMES = {
    "neon": "asimd",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avxvnni": "avx_vnni",
    "lzcnt": "abm",
}


def cpu_flags() -> frozenset[str] | None:
    """Flags of /proc/cpuinfo ('Features' on aarch64); None where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            for line in cpuinfo:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    return frozenset(value.split())
    except OSError:
        pass
    return None


def missing_cpu_flags(needed: list[str]) -> list[str]:
    """Those of `needed` that this host lacks; none where the system does not tell."""
    found = cpu_flags()
    if found is None:
        return []
    return [flag for flag in needed if CPUINFO_NAMES.get(flag, flag) not in found]


def machine() -> str:
    """The architecture's name, such as 'x86_64'; schedules/targets.py asks for the same."""
    return platform.machine() or "unknown"


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> dict[str, int]:
    """Bytes of this process: `rss` now, `rss_anonymous` (without mapped files), `rss_peak`."""
    names = {"VmRSS": "rss", "RssAnon": "rss_anonymous", "VmHWM": "rss_peak"}
    found = {}
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            for line in status:
                key, _, value = line.partition(":")
                if key in names:
                    found[names[key]] = int(value.split()[0]) * 1024
    except OSError:
        found["rss_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found


def show_bytes(count: int) -> str:
    """12345678 -> '12.3 MB'."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
