"""One prompt being continued: an iterator over pieces of text that keeps its own record."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from runtime.sampler import Sampler

if TYPE_CHECKING:
    from runtime.engine import Engine


class Generation(Iterator[str]):
    """Yields text as soon as its tokens make whole characters, until `finish` is set.

    `prompt` and `tokens` are token ids, the prompt's with <bos>, the tokens without <eos>.
    `finish` is None while running, then 'eos', 'length' (max_new_tokens),
    'context' (full) or 'closed'.
    The first token comes out of the prefill, so `decode_steps` is one less than the tokens drawn.
    The slot is taken by the first `next` and given back at the end, by `close`, or when dropped.
    """

    def __init__(self, engine: "Engine", prompt: list[int], max_new_tokens: int, sampler: Sampler):
        self.prompt = prompt
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.sampler = sampler
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.decode_steps = 0
        self._engine = engine
        self._limit = max_new_tokens
        self._tokenizer = engine.tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._slot: int | None = None

    def __next__(self) -> str:
        while self.finish is None:
            token = self._next_token()
            if token in self._engine.shape.eos_token_ids:
                self.finish = "eos"
                break
            self.tokens.append(token)
            if len(self.tokens) >= self._limit:
                self.finish = "length"
            elif len(self.prompt) + len(self.tokens) > self._engine.context:
                self.finish = "context"
            if piece := self._stream.step(self._tokenizer, token):
                return piece
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Stop here and give the slot back."""
        self.finish = self.finish or "closed"
        if self._slot is not None:
            self._engine.cache.release(self._slot)
            self._slot = None

    def __del__(self) -> None:
        if hasattr(self, "_slot"):
            self.close()

    def _next_token(self) -> int:
        """What follows the last token: out of the prompt the first time, then of a decode step."""
        engine, started = self._engine, time.perf_counter()
        if self._slot is None:
            self._slot = engine.cache.allocate()
            logits = engine.prefill(self.prompt, self._slot)
            self.prefill_seconds = time.perf_counter() - started
            return self.sampler.sample(logits)
        position = len(self.prompt) + len(self.tokens) - 1
        token = engine.decode_token(self.tokens[-1], self._slot, position, self.sampler)
        self.decode_seconds += time.perf_counter() - started
        self.decode_steps += 1
        return token
