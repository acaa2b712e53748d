"""How much memory is walked over so that what is read comes from there and from no cache."""

import os
import re
from functools import cache
from pathlib import Path

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
TIMES = 3  # the largest cache: less may be left in it by a policy that is not LRU
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}
MOST_COPIES = 1000  # a graph of ggml holds 2048 nodes
MOST_BYTES = 2**31  # of all copies, unless less would be within a cache, or memory is large


@cache
def largest_cache() -> int:
    """Bytes of the largest cache of the first CPU; 0 where the system does not tell."""
    sizes = [0]
    for file in CACHES.glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KMG])\s*", file.read_text(encoding="utf-8")):
            sizes.append(int(found[1]) * UNITS[found[2]])
    return max(sizes)


def memory() -> int:
    """Bytes of this host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def stream_bytes() -> int:
    """Of a streaming read."""
    return max(2**29, TIMES * largest_cache())


def copies(nbytes: float, held: float | None = None) -> int:
    """Of what has `held` bytes, of which a call reads `nbytes` (default: all), so that a round over
    all copies is cold, as far as MOST_COPIES and MOST_BYTES go."""
    wanted = max(300_000_000, TIMES * largest_cache())
    fitting = max(MOST_BYTES, wanted, memory() // 8) // max(1, int(held or nbytes))
    return max(2, min(MOST_COPIES, fitting, -(-wanted // max(1, int(nbytes)))))
