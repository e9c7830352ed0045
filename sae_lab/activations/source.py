"""Activations in the order of the text: the language model run over rows of it, by one process or several together."""

from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.lm.base import LanguageModel
from sae_lab.parallel.collectives import broadcast_from, rank, world_size
from sae_lab.text.rows import TextRows, take_rows


class Chunk(NamedTuple):
    """Some consecutive rows, the source's state from which they come again, and the text they come from, if any."""

    state: dict[str, Any]
    rows: Float[Tensor, "n s d"]
    tokens: Int[Tensor, "r t"] | None = None


class Source(Protocol):
    """Rows in order, in chunks; deterministic, and able to start at any chunk that it has given before."""

    def __iter__(self) -> Generator[Chunk, None, None]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LMSource:
    """Runs the language model over text rows: a `buffer.Source` of activations, one chunk a forward pass.

    It holds `turn` while it does: hooks and tokenizer serve one thread at a time. Of several processes each reads all
    of the text, but runs the model on every n-th chunk only, and leaves the others' rows for `Shared` to fetch.
    """

    def __init__(
        self, lm: LanguageModel, rows: TextRows, keep: Callable[[Tensor], Tensor], lm_batch_rows: int, turn: Lock
    ):
        self.lm, self.rows, self.keep, self.lm_batch_rows, self.turn = lm, rows, keep, lm_batch_rows, turn

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        while texts := self._read(world_size()):
            for i, (state, tokens) in enumerate(texts):
                mine = i == rank() or len(texts) < world_size()  # at the end of the text all run what is left
                yield Chunk(state, self._activations(tokens) if mine else self._other_rank_rows(tokens), tokens)

    def _read(self, n: int) -> list[tuple[dict[str, Any], Int[Tensor, "r t"]]]:
        """The text of the next n chunks, or of as many as there are, and where each begins."""
        with self.turn:
            texts = [(self.rows.state_dict(), take_rows(self.rows, self.lm_batch_rows)) for _ in range(n)]
        return [(state, tokens) for state, tokens in texts if len(tokens)]

    def _activations(self, tokens: Int[Tensor, "r t"]) -> Float[Tensor, "n s d"]:
        with self.turn:
            activations = self.lm.activations(tokens)
            return activations[self.keep(tokens).to(activations.device)]

    def _other_rank_rows(self, tokens: Int[Tensor, "r t"]) -> Float[Tensor, "n s d"]:
        """A tensor without memory, in the shape of what another process computes."""
        return torch.empty(int(self.keep(tokens).sum()), len(self.lm.sites), self.lm.d, device="meta")


class SharedSource:
    """A `buffer.Source` that several processes harvest together: each comes to have all chunks, in the same order."""

    def __init__(self, source: Source):
        self.source = source

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        with closing(iter(self.source)) as chunks:
            while group := list(islice(chunks, world_size())):
                yield from self._fetch(group)

    def _fetch(self, group: list[Chunk]) -> list[Chunk]:
        """The chunks with the rows that others have computed: the r-th comes from rank r."""
        if not any(chunk.rows.is_meta for chunk in group):
            return group
        own = group[rank()].rows.contiguous()
        rows = [
            own if i == rank() else torch.empty_like(chunk.rows, dtype=own.dtype, device=own.device)
            for i, chunk in enumerate(group)
        ]
        for i, chunk_rows in enumerate(rows):
            broadcast_from(chunk_rows, i)
        return [chunk._replace(rows=chunk_rows) for chunk, chunk_rows in zip(group, rows, strict=True)]
