"""Statistics: whether one kernel is faster than another, from rounds that both ran in.

Round i gives a pair of times that the same state of the machine made, so the ratio of each pair is
taken and the median of the ratios is judged. Its interval needs no assumption about the noise: the
j-th smallest and j-th largest of n ratios hold the median between them with the probability that of
n fair coins at least j fall on either side.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.99
SMALLEST_GAIN = 1.01  # a gain below this is none, however sure


@dataclass(frozen=True)
class Gain:
    """How many times as fast, and the interval of that."""

    ratio: float
    low: float
    high: float

    @property
    def is_real(self) -> bool:
        """Outside of the noise; always False of a kernel against itself."""
        return self.low > 1 and self.ratio >= SMALLEST_GAIN

    def __str__(self) -> str:
        if self.is_real:
            return f"{self.ratio:.2f}x"
        return "none" if self.high >= 1 else f"{self.ratio:.2f}x"


def gain(before: Sequence[float], after: Sequence[float]) -> Gain:
    """Of `after` over `before`, times of the same rounds."""
    ratios = sorted(b / a for b, a in zip(before, after, strict=True))
    j = rank(len(ratios))
    low, high = (ratios[j - 1], ratios[-j]) if j else (0.0, math.inf)
    return Gain(statistics.median(ratios), low, high)


def rank(n: int) -> int:
    """The largest j for which the interval has CONFIDENCE; 0 where n is too small for any."""
    j = 0
    while 1 - 2 * _tail(n, j + 1) >= CONFIDENCE:
        j += 1
    return j


def _tail(n: int, j: int) -> float:
    """P(fewer than j of n fair coins)."""
    return sum(math.comb(n, i) for i in range(j)) / 2**n


def spread(values: Sequence[float]) -> float:
    """Half of what lies between the quartiles, of the median: 0.05 is +- 5 %."""
    if len(values) < 4:
        return (max(values) - min(values)) / (2 * statistics.median(values))
    first, _, third = statistics.quantiles(values, n=4)
    return (third - first) / (2 * statistics.median(values))
