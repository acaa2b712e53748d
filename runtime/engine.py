"""The engine: an open artifact, its compiled module, a KV cache, and text in and out.

A step works on M token rows; row m belongs to cache slot `slots[m]` and stands at
`positions[m]` of that slot's sequence (docs/architecture.md, "Rows, not batches of sequences").
The compiled kernels check nothing, so what comes in is checked here.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from runtime import host, tvm_runtime
from runtime.artifact import Artifact
from runtime.device import failed_step, open_device, row_counts, shortened
from runtime.errors import ArtifactError, Numbers, RuntimeRefusal, require_whole, whole_array
from runtime.generation import Generation
from runtime.kv_cache import KVCache
from runtime.sampler import Sampler

PREFILL_ROWS = 256  # rows a step, where the artifact names none: one read of the weights for all
SCORE_ROWS = 64  # the same where each row's V logits are wanted

Found = TypeVar("Found")


class Engine:
    """One model, ready to run. `load` makes it; it may serve one thread at a time."""

    def __init__(
        self, artifact: Artifact, tokenizer: Tokenizer | None, cache: KVCache, threads: int
    ) -> None:
        self.artifact = artifact
        self.shape = artifact.shape
        self._tokenizer = tokenizer
        self.cache = cache
        self.threads = threads
        self.context = cache.context
        self.kv_bits = cache.bits
        self._device = cache.device
        self._module = artifact.open_library(self._device)
        self._functions = {name: self._function(name) for name in ("prefill", "decode")}
        for name in ("decode_one", "decode_token", "decode_sparsity"):
            if function := tvm_runtime.function_or_none(self._module, self._full_name(name)):
                self._functions[name] = function
        self._mailbox = self._device.mailbox() if "decode_token" in self._functions else None
        self._ran: set[tuple] = set()  # steps, with their rows: a GPU has captured them
        self._parameters = artifact.parameters(self._device)
        tvm_runtime.use_threads(threads)
        if self._device.takes_memory_at_once:
            self._take_memory()

    def _take_memory(self) -> None:
        """The longest step and one of a row: what is missing is told now, not amid a text."""
        rows = min(self._prompt_rows, self.context)
        self._append(np.zeros(rows, np.int64), 0, 0, [rows - 1])
        self.decode([0], [0], [0])
        if self.draws_on_device:
            self.decode_token(0, 0, 0, Sampler(temperature=0))

    @property
    def _prompt_rows(self) -> int:
        """Of a prompt, at most, in a step."""
        return int(self.artifact.manifest.get("prompt_rows", PREFILL_ROWS))

    @classmethod
    def load(
        cls,
        directory: Path | str,
        *,
        kv_bits: int | None = None,
        threads: int | None = None,
        context: int | None = None,
        slots: int = 1,
        verify: bool = True,
    ) -> "Engine":
        """Open an artifact directory, check it in full and make room for `slots` sequences.

        kv_bits: 16, 4 or 3; None is the artifact's default. threads: None is every usable CPU.
        context: tokens a sequence may have, at most (and by default) the artifact's length.
        verify: hash every file first. Raises `RuntimeRefusal`, for the directory `ArtifactError`.
        """
        cpus = host.usable_cpus()
        threads = cpus if threads is None else require_whole("threads", threads, 1, cpus)
        artifact = Artifact.open(directory, verify=verify)
        bits = artifact.default_kv_bits if kv_bits is None else kv_bits
        if bits not in artifact.kv_bits:
            possible = ", ".join(map(str, artifact.kv_bits))
            raise RuntimeRefusal(
                f"kv-bits: asked for {bits} of {artifact.path}; possible: {possible}"
            )
        length = artifact.context_length
        context = length if context is None else require_whole("context", context, 1, length)
        shape, device = artifact.shape, open_device(artifact.manifest)
        sizes = (shape.layers, slots, context, shape.kv_heads, shape.head_dim)
        cache = KVCache(*sizes, bits, device)
        parts = {"weights": artifact.params_bytes, "KV cache": cache.nbytes()}
        device.require(parts | artifact.step_bytes(bits, slots, context))
        return cls(artifact, _open_tokenizer(artifact), cache, threads)

    def _full_name(self, name: str) -> str:
        return f"{name}_kv{self.kv_bits}"

    def _function(self, name: str) -> Any:
        full_name = self._full_name(name)
        function = tvm_runtime.function_or_none(self._module, full_name)
        if function is None:
            raise ArtifactError(f"artifact {self.artifact.path}: its library has no {full_name}")
        return function

    @property
    def draws_on_device(self) -> bool:
        """Whether `decode_token` leaves the logits where they are, on a GPU."""
        return self._mailbox is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The artifact's; refuses where it was built from a checkpoint without one."""
        if self._tokenizer is None:
            raise ArtifactError(
                f"artifact {self.artifact.path}: asked for text, it has no tokenizer.json; "
                "possible: put one into the checkpoint and build again, or run runtime.bench"
            )
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, <bos> in front; refuses text that is empty or no Unicode."""
        if not text:
            raise RuntimeRefusal("prompt: it is empty; possible: at least one character")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RuntimeRefusal(
                f"prompt: it is not valid UTF-8 at character {error.start}; possible: UTF-8 text"
            ) from error
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.shape.bos_token_id, *ids]

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int = 40,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> Generation:
        """Continue a prompt: an iterator over pieces of text (see `Generation`, `Sampler`).

        A prompt of text gets <bos> in front; token ids are taken as they are. Stops at <eos>,
        after `max_new_tokens`, or when the context is full. Refuses before it runs anything.
        """
        sampler = Sampler(temperature, top_k, top_p, seed)
        require_whole("max-new-tokens", max_new_tokens, 1)
        tokens = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_sequence(tokens, 0)
        return Generation(self, tokens, max_new_tokens, sampler)

    def prefill(self, token_ids: Sequence[int], slot: int = 0, start: int = 0) -> np.ndarray:
        """Append tokens to a slot from position `start` on; logits f32[V] of the last one."""
        tokens = self._check_sequence(token_ids, start)
        logits = np.empty((1, 0), np.float32)
        rows = self._prompt_rows
        for begin in range(0, len(tokens), rows):
            chunk = tokens[begin : begin + rows]
            logits = self._append(chunk, slot, start + begin, [len(chunk) - 1])
        logits = logits if logits.flags.owndata else logits.copy()  # it goes back with the rest
        self._device.end_prompt()
        return logits[0]

    def score(self, token_ids: Sequence[int], slot: int = 0) -> np.ndarray:
        """Logits f32[N, V] of every position of a text, from position 0 on.

        Row i tells what follows token i. N·V floats: `score_chunks` keeps fewer at a time.
        """
        return np.concatenate([logits for _, logits in self.score_chunks(token_ids, slot)])

    def score_chunks(
        self, token_ids: Sequence[int], slot: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """`score` in pieces: (first position, logits f32[at most SCORE_ROWS, V])."""
        tokens = self._check_sequence(token_ids, 0)
        for begin in range(0, len(tokens), SCORE_ROWS):
            chunk = tokens[begin : begin + SCORE_ROWS]
            yield begin, self._append(chunk, slot, begin, range(len(chunk)))
        self._device.end_prompt()

    def decode(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]
    ) -> np.ndarray:
        """One step of M rows: logits f32[M, V]. Rows of one slot rise in position."""
        return self._call("decode", *self._check_rows(tokens, slots, positions))

    def decode_token(self, token: int, slot: int, position: int, sampler: Sampler) -> int:
        """One step of one row, and the token that follows it.

        On a GPU the step draws it, where its `sample` can; the logits then stay.
        """
        if self._mailbox is None:
            found = self._run("decode", *self._check_rows([token], [slot], [position]))
            uniform = sampler.draw()
        else:
            row, uniform = self._check_row(token, slot, position), sampler.draw()
            asked = row, sampler.temperature, sampler.top_k, sampler.top_p, uniform
            self._ended(self._mailbox.ask, *asked)  # it may wait for an interrupted step
            _, found = self._launch("decode_token", self._mailbox.tensors)
            drawn = self._ended(self._mailbox.wait)
            if drawn >= 0:
                return drawn
        return sampler.sample(self._ended(self._device.fetch, found)[0], uniform)

    def sparsity(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int]
    ) -> np.ndarray | None:
        """Share of zeros a decode step meets at o_proj and at down_proj, f32[layers, 2].

        None where the artifact was built without `decode_sparsity_kv{bits}`. The step is run
        like `decode`: it writes the cache.
        """
        if "decode_sparsity" not in self._functions:
            return None
        checked = self._check_rows(tokens, slots, positions)
        return self._call("decode_sparsity", *checked).copy()

    def _append(self, tokens: np.ndarray, slot: int, start: int, rows: Sequence[int]) -> np.ndarray:
        """Of checked tokens, as an array: to check rows again would take the time of a layer."""
        slots = whole_array("slots", [slot], self.cache.slots).repeat(len(tokens))
        positions = whole_array("positions", [start], self.context) + np.arange(len(tokens))
        return self._call("prefill", tokens, slots, positions, np.asarray(rows, np.int64))

    def _call(self, name: str, *arrays: np.ndarray) -> np.ndarray:
        return self._ended(self._device.fetch, self._run(name, *arrays))

    def _run(self, name: str, *arrays: np.ndarray) -> Any:
        tvm_runtime.use_threads(self.threads)
        if name == "decode" and len(arrays[0]) == 1 and "decode_one" in self._functions:
            name = "decode_one"
        return self._launch(name, self._device.inputs(name, arrays), *row_counts(arrays))

    def _launch(self, name: str, inputs: Sequence[Any], *rows: int) -> Any:
        """The first of a step of so many rows captures it, on a GPU."""
        arguments = [*inputs, self.cache.tensors, self._parameters]
        try:
            if (name, rows) not in self._ran:
                tvm_runtime.fill_pool(self._module, self._full_name(name), arguments)
            result = self._functions[name](*arguments)
        except (TypeError, ValueError, RuntimeError) as error:  # TVM's check of every argument
            if refusal := self._device.why(str(error)):
                raise RuntimeRefusal(refusal) from error
            raise ArtifactError(
                f"artifact {self.artifact.path}: its library refuses the parameters or caches that "
                f"artifact.json and config.json describe: {shortened(error)}; possible: build it "
                "again"
            ) from error
        self._ran.add((name, rows))
        return result

    def _ended(self, call: Callable[..., Found], *arguments: Any) -> Found:
        """What `call` gives, which waits for a launched step: a GPU tells only then how it went."""
        try:
            return call(*arguments)
        except RuntimeError as error:
            refusal = self._device.why(str(error)) or failed_step(error)
            raise RuntimeRefusal(refusal) from error

    def _check_sequence(self, token_ids: Sequence[int], start: int) -> np.ndarray:
        """The tokens as i64[N]."""
        if len(token_ids) == 0:
            raise RuntimeRefusal("prompt: it has no tokens; possible: at least one")
        if start + len(token_ids) > self.context:
            after = f" after {start} before it" if start else ""
            raise RuntimeRefusal(
                f"prompt: it has {len(token_ids)} tokens{after}; the context holds {self.context}; "
                "possible: a shorter prompt"
            )
        return whole_array("token ids", token_ids, self.shape.vocab_size)

    def _check_row(self, token: int, slot: int, position: int) -> tuple[int, int, int]:
        """`_check_rows` of one row."""
        if self._is_row(row := (token, slot, position)):
            return row
        token, slot, position = (int(v[0]) for v in self._check_rows([token], [slot], [position]))
        return token, slot, position

    def _is_row(self, row: tuple[int, int, int]) -> bool:
        """Whether `_check_rows` would take it, in a tenth of the time; False: it is to say."""
        limits = self.shape.vocab_size, self.cache.slots, self.context
        return all(type(v) is int and 0 <= v < n for v, n in zip(row, limits, strict=True))

    def _check_rows(
        self, tokens: Numbers, slots: Numbers, positions: Numbers
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not len(tokens) == len(slots) == len(positions) > 0:
            raise RuntimeRefusal(
                f"rows: {len(tokens)} tokens, {len(slots)} slots, {len(positions)} positions; "
                "possible: as many of each, at least one"
            )
        if len(tokens) == 1 and self._is_row(row := (*tokens, *slots, *positions)):
            token, slot, position = (np.array([v], np.int64) for v in row)
            return token, slot, position
        checked = (
            whole_array("token ids", tokens, self.shape.vocab_size),
            whole_array("slots", slots, self.cache.slots),
            whole_array("positions", positions, self.context),
        )
        if len(tokens) == 1:
            return checked
        order = np.argsort(checked[1], kind="stable")
        same_slot = np.diff(checked[1][order]) == 0
        if np.any(np.diff(checked[2][order])[same_slot] <= 0):
            raise RuntimeRefusal("positions: rows of one slot must rise in position within a step")
        return checked


def _open_tokenizer(artifact: Artifact) -> Tokenizer | None:
    path = artifact.path / "tokenizer.json"
    if path.name not in artifact.manifest["files"]:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise ArtifactError(f"artifact: {path} is no tokenizer: {error}") from error
    found, limit = tokenizer.get_vocab_size(), artifact.shape.vocab_size
    if found > limit:
        raise ArtifactError(f"artifact: {path} has {found} tokens, the model {limit}")
    return tokenizer
