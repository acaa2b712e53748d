"""The sampler: logits of one row to a token. Temperature, then top-k, then top-p.

    p = softmax(logits / temperature) over the k likeliest tokens
    nucleus = the shortest run of the likeliest tokens whose p sum to at least top_p

Ties go to the lower token id, so that top-k 1 and temperature 0 are the same thing.
"""

import math

import numpy as np

from runtime.errors import RuntimeRefusal, require_whole


class Sampler:
    """Draws tokens; the same seed and the same logits give the same tokens.

    temperature: 0 takes the likeliest token. top_k: 0 keeps all. top_p: in (0, 1], 1 keeps all.
    seed: None takes one from the system; `self.seed` says which.
    """

    def __init__(
        self,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> None:
        if not (_is_number(temperature) and temperature >= 0):
            raise RuntimeRefusal(
                f"temperature: asked for {temperature}; possible: 0 (greedy) and finite numbers "
                "above"
            )
        if not (_is_number(top_p) and 0 < top_p <= 1):
            raise RuntimeRefusal(f"top-p: asked for {top_p}; possible: above 0, at most 1 (all)")
        self.temperature = float(temperature)
        self.top_k = require_whole("top-k", top_k, 0)
        self.top_p = float(top_p)
        fresh = int(np.random.SeedSequence().entropy) % 2**32  # type: ignore[arg-type]
        self.seed = fresh if seed is None else require_whole("seed", seed, 0)
        self._generator = np.random.default_rng(self.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, and nothing drawn."""
        return self.temperature == 0 or self.top_k == 1

    def draw(self) -> float:
        """The next uniform number in [0, 1); one a token, wherever it is sampled."""
        return 0.0 if self.is_greedy else float(self._generator.random())

    def sample(self, logits: np.ndarray, uniform: float | None = None) -> int:
        """A token from f32[V], by `uniform` or the next draw; refuses what is no number."""
        uniform = self.draw() if uniform is None else uniform
        best = int(np.argmax(logits))  # the first NaN, where there is one
        if not math.isfinite(logits[best]):
            raise RuntimeRefusal(
                f"sampler: the logit of token {best} is {logits[best]}, no finite number"
            )
        if self.is_greedy:
            return best
        tokens, p = self.candidates(logits)
        drawn = np.searchsorted(np.cumsum(p), uniform, side="right")
        return int(tokens[min(int(drawn), len(tokens) - 1)])

    def candidates(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens i64[C], probabilities f64[C]) that may be drawn; the latter sum to 1."""
        tokens = self._likeliest(logits)
        # Subtracting first keeps a tiny temperature from overflowing: every exponent is <= 0.
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            gap = logits[tokens].astype(np.float64) - float(logits[tokens].max())
            exponent = np.where(gap == 0, 0.0, gap / max(self.temperature, 1e-300))
        p = np.exp(exponent)
        p /= p.sum()
        if self.top_p == 1 and self.top_k == 0:
            return tokens, p
        # A token below this share is outside the nucleus: all of them sum to < 1 - top_p.
        kept = p * len(p) >= 1 - self.top_p
        tokens, p = tokens[kept], p[kept]
        order = np.argsort(-p, kind="stable")
        size = int(np.searchsorted(np.cumsum(p[order]), self.top_p)) + 1
        tokens, p = tokens[order[:size]], p[order[:size]]
        return tokens, p / p.sum()

    def _likeliest(self, logits: np.ndarray) -> np.ndarray:
        """The top-k tokens in rising order, ties at the edge to the lower id; all where k is 0."""
        if not 0 < self.top_k < len(logits):
            return np.arange(len(logits))
        edge = np.partition(logits, len(logits) - self.top_k)[len(logits) - self.top_k]
        above = np.flatnonzero(logits > edge)
        ties = np.flatnonzero(logits == edge)[: self.top_k - len(above)]
        return np.sort(np.concatenate((above, ties)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
