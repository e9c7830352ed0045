"""Activations in the order of the text, computed by one process or by several together."""

from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.finite import FiniteCheck, remedy_for
from sae_lab.lm.base import LanguageModel
from sae_lab.lm.packing import one_sequence_per_row
from sae_lab.parallel.collectives import broadcast_from
from sae_lab.parallel.mesh import rank, world_size
from sae_lab.runtime.device import send
from sae_lab.text.rows import RowStream


class Chunk(NamedTuple):
    """Consecutive rows, the source's state from which they can be computed again, and their text rows, if any."""

    state: dict[str, Any]
    rows: Float[Tensor, "n s d"]
    tokens: Int[Tensor, "r t"] | None = None


class Launched(NamedTuple):
    """A chunk that a GPU may still be computing, and the check to wait for; None if another rank computes it."""

    chunk: Chunk
    check: FiniteCheck | None


class Source(Protocol):
    """A deterministic iterable of chunks of rows, which can restart at the state of any chunk."""

    def __iter__(self) -> Generator[Chunk, None, None]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def launch_activations(lm: LanguageModel, tokens: Int[Tensor, "r t"], keep: Bool[Tensor, "r t"]) -> FiniteCheck:
    """Start to compute the activations at the positions to keep. The host does not wait for a GPU.

    Which rows are kept is known on the CPU, where `tokens` and `keep` are: a mask on the GPU would make the host wait
    for the number of its rows.
    """
    with nullcontext() if lm.device.type == "cpu" else one_sequence_per_row():
        rows = lm.activations(send(tokens, lm.device)).flatten(0, 1)
    if not keep.all():
        rows = rows.index_select(0, send(keep.flatten().nonzero().squeeze(1), rows.device))
    return FiniteCheck(rows, lm.sites, remedy_for(lm, rows.dtype))


def kept_activations(
    lm: LanguageModel, tokens: Int[Tensor, "r t"], keep: Bool[Tensor, "r t"]
) -> Float[Tensor, "n s d"]:
    """Return the activations at the positions to keep.

    Raises:
        UserError: they are not finite.
    """
    return launch_activations(lm, tokens, keep).wait()


class LMSource:
    """A Source that runs the language model over text rows, one forward pass per chunk.

    It holds `lock` meanwhile, because hooks and tokenizer are not thread-safe. With n processes, each reads all of the
    text but runs the model on every n-th chunk only; `SharedSource` fetches the rows of the other chunks.
    """

    def __init__(
        self, lm: LanguageModel, rows: RowStream, keep: Callable[[Tensor], Tensor], lm_batch_rows: int, lock: Lock
    ):
        self.lm, self.rows, self.keep, self.lm_batch_rows, self.lock = lm, rows, keep, lm_batch_rows, lock

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        with closing(self.launch()) as launched:
            for chunk, check in launched:
                if check is not None:
                    check.wait()
                yield chunk

    def launch(self) -> Generator[Launched, None, None]:
        """Yield the chunks as soon as a GPU has been told to compute them. Wait for the check before you use them."""
        with closing(self.rows):
            while texts := self._read(world_size()):
                for i, (state, tokens) in enumerate(texts):
                    if i == rank() or len(texts) < world_size():  # at the end of the text, every process runs the rest
                        with self.lock:
                            check = launch_activations(self.lm, tokens, self.keep(tokens))
                        yield Launched(Chunk(state, check.rows, tokens), check)
                    else:
                        yield Launched(Chunk(state, self._other_rank_rows(tokens), tokens), None)

    def _read(self, n: int) -> list[tuple[dict[str, Any], Int[Tensor, "r t"]]]:
        """Return the state and the text rows of each of the next n chunks, or of as many as are left."""
        with self.lock:
            texts = [(self.rows.state_dict(), self.rows.take(self.lm_batch_rows)) for _ in range(n)]
        return [(state, tokens) for state, tokens in texts if len(tokens)]

    def _other_rank_rows(self, tokens: Int[Tensor, "r t"]) -> Float[Tensor, "n s d"]:
        """Return a meta tensor that stands in for the rows that another rank computes."""
        return torch.empty(int(self.keep(tokens).sum()), len(self.lm.sites), self.lm.d, device="meta")


class SharedSource:
    """A Source that several processes compute together; each of them yields all chunks, in the same order."""

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
        """Fill in the rows that other ranks computed; rank r broadcasts the r-th chunk."""
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
