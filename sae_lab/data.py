"""Text -> frozen language model -> shuffled batches of activations, as a LightningDataModule that owns its place."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import DataLoader

from sae_lab.buffer import Chunk, ShuffledBlocks
from sae_lab.errors import UserError
from sae_lab.lm.base import LanguageModel
from sae_lab.text import (
    HELD_OUT,
    TRAIN,
    DisassembledStdlib,
    Documents,
    FileDocuments,
    HubDocuments,
    StdlibDocuments,
    TextRows,
)


class Harvest:
    """Runs the language model over text rows: a `buffer.Source` of activations, one chunk a forward pass."""

    def __init__(self, lm: LanguageModel, rows: TextRows, keep: Callable[[Tensor], Tensor], lm_batch_rows: int):
        self.lm, self.rows, self.keep, self.lm_batch_rows = lm, rows, keep, lm_batch_rows

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)

    def __iter__(self) -> Iterator[Chunk]:
        while True:
            state = self.rows.state_dict()
            tokens = take_rows(self.rows, self.lm_batch_rows)
            if len(tokens) == 0:
                return
            activations = self.lm.activations(tokens)
            yield Chunk(state, activations[self.keep(tokens).to(activations.device)])


class Batches:
    """What Lightning iterates over: n_rows rows of the stream, the last batch with what is left of them.

    It has a length, without which Lightning would read one batch ahead.
    """

    def __init__(self, stream: ShuffledBlocks, n_rows: int):
        self.stream, self.n_rows = stream, n_rows

    def __len__(self) -> int:
        return math.ceil(self.n_rows / self.stream.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        while (left := self.n_rows - self.stream.n_given * self.stream.batch_size) > 0:
            batch = next(self.stream, None)
            if batch is None:
                return
            yield batch[:left]


class ActivationData(L.LightningDataModule):
    """Batches `(b, s, d)` of a frozen language model's activations, shuffled, deterministic in (config, seed).

    Args:
        lm: the language model and its sites. It lives here and never in a checkpoint.
        documents: `documents(split)` gives the documents of `train` or `held_out`.
        seq_len: tokens in a row, BOS included.
        batch_size: rows of activations (tokens) in a training batch.
        n_tokens: activations to train on, exactly; the last batch holds what is left for it.
        block_tokens: activations that are shuffled together; the memory of a block is
            block_tokens · s · d · bytes of `lm.dtype`, twice that while a block is gathered.
        lm_batch_rows: text rows in one forward pass of the language model.
        exclude_bos: leave out every BOS token.
        exclude_first: leave out the first n positions of each row.
        pack: rows may cross documents; otherwise what does not fill a row of its own is left out.
        repeat: start the text over where it ends before n_tokens; otherwise the run ends there.
        n_eval_tokens, n_val_tokens: held-out tokens for the evaluation after training and for validation during it.
        seed: of the order of documents and of the shuffling.

    Raises:
        UserError: fewer tokens than one batch, or excluded positions that leave nothing of a row.
    """

    def __init__(
        self,
        lm: LanguageModel,
        documents: Callable[[str], Documents],
        *,
        seq_len: int,
        batch_size: int,
        n_tokens: int,
        block_tokens: int,
        lm_batch_rows: int,
        exclude_bos: bool,
        exclude_first: int,
        pack: bool,
        repeat: bool,
        n_eval_tokens: int,
        n_val_tokens: int,
        seed: int,
    ):
        super().__init__()
        sizes = {"n_tokens": n_tokens, "batch_size": batch_size, "block_tokens": block_tokens}
        for name, size in (sizes | {"lm_batch_rows": lm_batch_rows, "n_eval_tokens": n_eval_tokens}).items():
            if not isinstance(size, int | float) or size < 1:
                raise UserError(f"{name}={size} must be a number of at least 1.")
        if lm.context is not None and seq_len > lm.context:
            raise UserError(f"seq_len={seq_len} is longer than the context of {lm.name}: give {lm.context} or less.")
        for name, flag in {"repeat": repeat, "pack": pack}.items():
            if not isinstance(flag, bool):
                raise UserError(f"data.{name}={flag} must be true or false.")
        if n_tokens < batch_size:
            raise UserError(f"n_tokens={n_tokens} is less than one batch of batch_size={batch_size}: raise n_tokens.")
        if exclude_first + exclude_bos >= seq_len:
            raise UserError(f"data.exclude_first={exclude_first} leaves nothing of a row of seq_len={seq_len} tokens.")
        self.lm, self.documents, self.seed, self.repeat, self.pack = lm, documents, seed, repeat, pack
        self.seq_len, self.batch_size, self.n_tokens = seq_len, batch_size, int(n_tokens)
        self.block_tokens, self.lm_batch_rows = int(block_tokens), lm_batch_rows
        self.exclude_bos, self.exclude_first = exclude_bos, exclude_first
        self.n_eval_tokens, self.n_val_tokens = int(n_eval_tokens), int(n_val_tokens)
        self.stream = self.new_stream()
        self._validation: list[Tensor] | None = None

    @property
    def n_steps(self) -> int:
        return len(self.train_dataloader())

    @property
    def d_in(self) -> int:
        return self.lm.d

    @property
    def n_sources(self) -> int:
        return len(self.lm.sites)

    def keep(self, tokens: Int[Tensor, "n t"]) -> Bool[Tensor, "n t"]:
        """Which positions an SAE is trained and judged on."""
        kept = torch.ones_like(tokens, dtype=torch.bool)
        kept[:, : self.exclude_first] = False
        return kept & (tokens != self.lm.bos_id) if self.exclude_bos else kept

    def text(self, split: str, repeat: bool) -> TextRows:
        return TextRows(self.documents(split), self.lm.tokenizer, self.seq_len, self.lm.bos_id, repeat, self.pack)

    def new_stream(self) -> ShuffledBlocks:
        """The training stream from its beginning."""
        harvest = Harvest(self.lm, self.text(TRAIN, self.repeat), self.keep, self.lm_batch_rows)
        return ShuffledBlocks(harvest, self.block_tokens, self.batch_size, self.seed)

    def held_out_rows(self, n_tokens: int) -> Int[Tensor, "n t"]:
        """Held-out text rows, from the beginning of the split, at least one and at most a pass; n_tokens in all.

        Their order is mixed (the same way every time), so that neighbouring rows come from different documents.
        """
        rows = take_rows(self.text(HELD_OUT, repeat=False), max(1, n_tokens // self.seq_len))
        if len(rows) == 0:
            raise UserError(
                f"the held-out text is shorter than one row of seq_len={self.seq_len} tokens: give more text."
            )
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]

    def probe_rows(self, n: int = 16) -> Float[Tensor, "n s d"]:
        """Activations at n positions of one held-out text row, spread over it: what a saved SAE is checked on."""
        tokens = self.held_out_rows(self.seq_len)
        x = self.lm.activations(tokens)[self.keep(tokens)]
        return x[:: max(1, len(x) // n)][:n]

    def train_dataloader(self) -> Batches:
        return Batches(self.stream, self.n_tokens)

    def val_dataloader(self) -> DataLoader:
        if self._validation is None:
            chunks = self.held_out_rows(self.n_val_tokens).split(self.lm_batch_rows)
            rows = torch.cat([self.lm.activations(tokens)[self.keep(tokens)] for tokens in chunks])
            self._validation = list(rows.split(self.batch_size))
        return DataLoader(self._validation, batch_size=None)  # type: ignore[arg-type]

    def calibration_batches(self, n: int) -> Iterator[Float[Tensor, "b s d"]]:
        """The first n training batches again, or as many as the run has."""
        stream = self.new_stream()
        for _ in range(min(n, self.n_steps)):
            batch = next(stream, None)
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stream.load_state_dict(state_dict)


def take_rows(rows: Iterator[list[int]], n: int) -> Int[Tensor, "n t"]:
    """The next n rows, or as many as are left."""
    return torch.tensor([row for _, row in zip(range(n), rows, strict=False)], dtype=torch.long)


def stdlib(lm: LanguageModel, seed: int, held_out_every: int, **stream: Any) -> ActivationData:
    """`data=stdlib`: the source of Python's standard library."""
    documents = partial(StdlibDocuments, seed=seed, held_out_every=held_out_every)
    return ActivationData(lm, documents, seed=seed, **stream)


def disassembly(lm: LanguageModel, seed: int, held_out_every: int, mixed: bool, **stream: Any) -> ActivationData:
    """`data=disassembly`: its bytecode listings."""
    documents = partial(DisassembledStdlib, seed=seed, held_out_every=held_out_every, mixed=mixed)
    return ActivationData(lm, documents, seed=seed, **stream)


def text_files(
    lm: LanguageModel,
    paths: Sequence[str] | str,
    column: Sequence[str] | str | None,
    seed: int,
    held_out_every: int,
    **stream: Any,
) -> ActivationData:
    """`data=text_files`: globs of txt, jsonl, csv or parquet."""
    paths = paths if isinstance(paths, str) else list(paths)
    documents = partial(FileDocuments, paths, column=column, seed=seed, held_out_every=held_out_every)
    return ActivationData(lm, documents, seed=seed, **stream)


def hub(
    lm: LanguageModel,
    path: str,
    name: str | None,
    hub_split: str,
    column: Sequence[str] | str | None,
    seed: int,
    held_out_documents: int,
    **stream: Any,
) -> ActivationData:
    """`data=openwebtext`, `data=fineweb`, ...: a data set of the Hugging Face hub, streamed."""
    options: dict[str, Any] = {
        "name": name,
        "hub_split": hub_split,
        "column": column,
        "held_out_documents": held_out_documents,
    }
    return ActivationData(lm, partial(HubDocuments, path, seed=seed, **options), seed=seed, **stream)
