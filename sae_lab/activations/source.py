"""Activations in the order of the text, computed by one process or by several together."""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from itertools import cycle, islice
from threading import Lock
from typing import Any, NamedTuple, Protocol

from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.workers import Pending, rows_elsewhere, workers_of
from sae_lab.lm.base import LanguageModel
from sae_lab.parallel.collectives import gather_counts
from sae_lab.parallel.mesh import rank, world_size
from sae_lab.text.rows import RowStream


class Chunk(NamedTuple):
    """Consecutive rows, the source's state from which they can be computed again, and their text rows, if any.

    Of a chunk that another rank computes, the rows are a meta tensor and there are no text rows.
    """

    state: dict[str, Any]
    rows: Float[Tensor, "n s d"]
    tokens: Int[Tensor, "r t"] | None = None
    rank: int = 0
    """The rank that computes the rows."""


class Launched(NamedTuple):
    """A chunk that is being computed, and what to wait for; None if nothing is."""

    chunk: Chunk
    pending: Pending | None

    def wait(self) -> Chunk:
        """Wait for the rows of the chunk, and return it with them."""
        return self.chunk if self.pending is None else self.chunk._replace(rows=self.pending.wait())


class Source(Protocol):
    """A deterministic iterable of chunks of rows, which can restart at the state of any chunk."""

    def __iter__(self) -> Generator[Chunk, None, None]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LMSource:
    """A Source that runs the language model over text rows, one forward pass per chunk.

    With n ranks, each reads and computes every n-th chunk only. It knows where the others begin, but not how many rows
    they have: it assumes as many as its own has, and SharedSource corrects that.

    Args:
        lm: the language model.
        rows: the text.
        keep: returns a mask of the positions to keep.
        lm_batch_rows: text rows of a chunk.
        lock: held while `lm` runs, because hooks are not thread-safe.
        text_lock: held while text is read, because tokenizers are not.
        copies: returns copies of the language model, which take the chunks in turn with `lm`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: RowStream,
        keep: Callable[[Tensor], Tensor],
        lm_batch_rows: int,
        lock: Lock,
        text_lock: Lock,
        copies: Callable[[], Sequence[LanguageModel]] = list,
    ):
        self.lm, self.rows, self.keep, self.lm_batch_rows, self.lock = lm, rows, keep, lm_batch_rows, lock
        self.text_lock, self.copies = text_lock, copies

    def state_dict(self) -> dict[str, Any]:
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)

    @property
    def n_at_once(self) -> int:
        """Chunks of this rank that are computed side by side."""
        return 1 + len(self.copies())

    def __iter__(self) -> Generator[Chunk, None, None]:
        """Yield the chunks. Every copy of the language model computes one meanwhile."""
        running = deque[Launched]()
        with closing(self.launch()) as launched:
            for item in launched:
                running.append(item)
                while running and (running[0].pending is None or count_pending(running) >= self.n_at_once):
                    yield running.popleft().wait()
        for item in running:
            yield item.wait()

    def launch(self) -> Generator[Launched, None, None]:
        """Yield the chunks as soon as a device has been told to compute them. Wait for them before you use them."""
        with ExitStack() as stack:
            stack.enter_context(closing(self.rows))
            workers = workers_of([self.lm, *self.copies()], self.lock)
            turn = cycle([stack.enter_context(closing(worker)) for worker in workers])
            while texts := self._read(world_size()):
                own = next((tokens for _, tokens in texts if tokens is not None), None)
                keep = None if own is None else self.keep(own)
                for i, (state, tokens) in enumerate(texts):
                    if tokens is None:
                        rows = rows_elsewhere(self.lm, 0 if keep is None else int(keep.sum()))
                        yield Launched(Chunk(state, rows, rank=i), None)
                    else:
                        assert keep is not None
                        pending = next(turn).launch(tokens, keep)
                        yield Launched(Chunk(state, pending.rows, tokens, i), pending)

    def _read(self, n: int) -> list[tuple[dict[str, Any], Int[Tensor, "r t"] | None]]:
        """Return the state of each of the next n chunks, or of as many as are left, and the text rows of this rank's.

        Text rows of other ranks are skipped, and None.
        """
        texts = list[tuple[dict[str, Any], Tensor | None]]()
        with self.text_lock:
            for i in range(n):
                state = self.rows.state_dict()
                tokens = self.rows.take(self.lm_batch_rows) if i == rank() else None
                if (self.rows.skip(self.lm_batch_rows) if tokens is None else len(tokens)) == 0:
                    break
                texts.append((state, tokens))
        return texts


def count_pending(launched: Sequence[Launched]) -> int:
    return sum(item.pending is not None for item in launched)


class SharedSource:
    """A Source that several ranks compute together: each yields all chunks in the same order, with the rows of its own.

    The i-th of n consecutive chunks is computed by rank i. The rows of the others are meta, of the right number.
    """

    def __init__(self, source: Source):
        self.source = source

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        with closing(iter(self.source)) as chunks:
            while group := list(islice(chunks, world_size())):
                yield from self._count(group)

    def _count(self, group: list[Chunk]) -> list[Chunk]:
        """Let the rows of each chunk be as many as the rank has that computes it."""
        if world_size() == 1:
            return group
        counts = gather_counts(len(group[rank()].rows) if rank() < len(group) else 0)
        return [
            chunk if i == rank() else chunk._replace(rows=chunk.rows.new_empty(counts[i], *chunk.rows.shape[1:]))
            for i, chunk in enumerate(group)
        ]
