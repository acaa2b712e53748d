"""Text to token windows: decompress, train the tokenizer, encode, serve windows by step.

DIR holds train.txt.xz and valid.txt.xz: one paragraph a line, books apart by three newlines.
The run folder caches tokenizer.json (byte-level BPE, <bos> = 0, <eos> = 1) and {train,valid}.bin,
uint16 tokens, each book as <bos> ... <eos>. A window is `seq` targets; its inputs are <bos> and
the targets but the last, so that position 0 is always <bos>, as at inference.
"""

import lzma
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SPLITS = ("train", "valid")
BOOK_SEPARATOR = "\n\n\n"
SPECIAL_TOKENS = ("<bos>", "<eos>")
TOKENIZER_NAME = "tokenizer.json"
PARAGRAPHS_AT_ONCE = 20_000  # an encode batch: threads inside tokenizers, bounded memory here


class DataError(ValueError):
    """Data that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Windows:
    """Fixed windows of a token stream on a device, in an order that depends on seed and step."""

    tokens: Tensor  # int32 [n]
    bos: int
    seq: int

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 * self.seq:
            raise DataError(
                f"data: {len(self.tokens)} tokens found, two windows of {self.seq} asked; "
                "give a smaller --seq"
            )

    def __len__(self) -> int:
        """Windows in an epoch: one less than fit, so that each epoch may shift them."""
        return len(self.tokens) // self.seq - 1

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [size, seq], of one training step (0, 1, ...)."""
        numbers = np.arange(step * size, (step + 1) * size)
        starts = np.empty(size, dtype=np.int64)
        for epoch in np.unique(numbers // len(self)):
            order, shift = self._epoch(int(epoch), seed)
            here = numbers // len(self) == epoch
            starts[here] = order[numbers[here] % len(self)] * self.seq + shift
        return self._gather(torch.from_numpy(starts))

    def _epoch(self, epoch: int, seed: int) -> tuple[np.ndarray, int]:
        generator = np.random.default_rng((seed, epoch))
        shift = int(generator.integers(self.seq))
        return generator.permutation(len(self)), shift

    def _gather(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        device = self.tokens.device
        position = torch.arange(self.seq, device=device)
        targets = self.tokens[starts.to(device)[:, None] + position].long()
        return bos_shifted(targets, self.bos), targets

    def sequential(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of exactly `size` windows in text order, without shift; the last ones repeat
        earlier text only if fewer than `size` windows exist. `limit` is in tokens."""
        count = len(self.tokens) // self.seq
        if limit is not None:
            count = min(count, max(1, limit // self.seq))
        whole = max(size, count // size * size)
        starts = torch.arange(whole) % count * self.seq
        for first in range(0, whole, size):
            yield self._gather(starts[first : first + size])


def bos_shifted(targets: Tensor, bos: int) -> Tensor:
    """The inputs that predict `targets`: <bos>, then all targets but the last."""
    return torch.cat([torch.full_like(targets[:, :1], bos), targets[:, :-1]], dim=1)


def prepare(data_dir: Path, run_dir: Path, vocab_size: int) -> None:
    """Make tokenizer.json and {train,valid}.bin in the run folder where they are missing."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    names = [TOKENIZER_NAME] + [f"{split}.bin" for split in SPLITS]
    if all((run_dir / name).exists() for name in names):
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"run: asked for {run_dir}, it cannot be made: {error.strerror}; possible: a folder"
        ) from error
    texts = {split: read_books(data_dir / f"{split}.txt.xz") for split in SPLITS}
    tokenizer = train_tokenizer(texts["train"], vocab_size)
    _replace(run_dir / TOKENIZER_NAME, tokenizer.to_str(pretty=True).encode())
    for split, books in texts.items():
        tokens = encode_books(tokenizer, books)
        print(f"data: {split} {len(books)} books, {len(tokens):,} tokens", flush=True)
        _replace(run_dir / f"{split}.bin", tokens.tobytes())


def read_books(path: Path) -> list[str]:
    try:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise DataError(
            f"data: cannot read {path}: {error.strerror or error}; possible: --data with a folder "
            "that has it"
        ) from error
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"data: {path} is not xz-compressed UTF-8 text: {error}") from error
    return [book.strip("\n") + "\n" for book in text.split(BOOK_SEPARATOR) if book.strip()]


def train_tokenizer(books: list[str], vocab_size: int):
    """A byte-level BPE; encoding prepends <bos> unless special tokens are switched off."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs(books), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    if tokenizer.get_vocab_size() > vocab_size:
        raise DataError(
            f"data: a vocabulary of {vocab_size} is too small for bytes; "
            f"needs {tokenizer.get_vocab_size()}"
        )
    return tokenizer


def paragraphs(books: list[str]) -> Iterator[str]:
    """Lines with their newline: the pre-tokenizer never joins text across one."""
    for book in books:
        yield from book.splitlines(keepends=True)


def encode_books(tokenizer, books: list[str]) -> np.ndarray:
    """<bos> book <eos> for each book, uint16."""
    bos, eos = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)
    pieces: list[np.ndarray] = []
    for book in books:
        pieces.append(np.array([bos], dtype=np.uint16))
        lines = book.splitlines(keepends=True)
        for first in range(0, len(lines), PARAGRAPHS_AT_ONCE):
            part = lines[first : first + PARAGRAPHS_AT_ONCE]
            for encoding in tokenizer.encode_batch_fast(part, add_special_tokens=False):
                pieces.append(np.array(encoding.ids, dtype=np.uint16))
        pieces.append(np.array([eos], dtype=np.uint16))
    return np.concatenate(pieces)


def load_windows(run_dir: Path, split: str, bos: int, seq: int, device: torch.device) -> Windows:
    """The cached tokens of a split on the device, whole: 4 bytes a token."""
    tokens = np.memmap(run_dir / f"{split}.bin", dtype=np.uint16, mode="r")
    return Windows(torch.from_numpy(tokens.astype(np.int32)).to(device), bos, seq)


def _replace(path: Path, content: bytes) -> None:
    """Write so that a cut-off run leaves no half file behind."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
