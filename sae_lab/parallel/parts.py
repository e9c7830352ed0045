"""Parts of a batch that one process trains on one after the other, each as if it were a rank of its own.

What a part must know of the others (see collectives.py) is there only after all of them have been looked at. So a part
runs until it needs such a number, and gives up with `Waiting`. When all parts wait, their numbers are combined, and all
run again from the start: what they were told before is now known. Nothing of a part stays in memory while another one
runs, but for what it was told and what it chose to remember.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
Combine = Callable[[list[Any]], Sequence[Any]]
"""Maps what each part gives to what each is told."""


class Waiting(BaseException):
    """Ends a part that must wait for the others. Not an error, so that `except Exception` does not catch it."""

    def __init__(self, combine: Combine, given: Any):
        super().__init__()
        self.combine, self.given = combine, given


class Part:
    """One part of a batch, and what it knows from earlier runs, in the order in which it asks for it.

    Args:
        index: number of the part.
        n_parts: number of parts of the batch.
        rows: rows of the part.
        rows_of_batch: rows of all parts.
    """

    def __init__(self, index: int, n_parts: int, rows: int, rows_of_batch: int):
        self.index, self.n_parts, self.rows, self.rows_of_batch = index, n_parts, rows, rows_of_batch
        self.known: list[tuple[int, Any]] = []
        """Values, each with the number of `remember`s inside which it was asked for."""
        self.position = self.depth = 0

    @property
    def weight(self) -> float:
        """The weight of the part in a mean over parts: 1 if all have the same number of rows."""
        return self.rows * self.n_parts / self.rows_of_batch

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let collectives.py take this part for the rank, from the start of its run."""
        self.position = self.depth = 0
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def exchange(self, combine: Combine, compute: Callable[[], Any]) -> Any:
        """Give `compute()`, computed once, and return what `combine` makes of the values of all parts for this one."""
        if self.position == len(self.known):
            raise Waiting(combine, compute())
        self.position += 1
        return self.known[self.position - 1][1]

    def remember(self, compute: Callable[[], T]) -> T:
        """Return the value of `compute()`, computed once. What was told inside it is forgotten."""
        start = self.position
        if start == len(self.known) or self.known[start][0] > self.depth:
            self.depth += 1
            value = compute()
            self.depth -= 1
            self.known[start:] = [(self.depth, value)]
        self.position = start + 1
        return self.known[start][1]


_active: ContextVar[Part | None] = ContextVar("active", default=None)
_n_parts: ContextVar[int] = ContextVar("n_parts", default=1)


def active_part() -> Part | None:
    """Return the part that runs in this thread; None outside of `run_parts`."""
    return _active.get()


def exchange(combine: Combine, compute: Callable[[], Any]) -> Any:
    """Return what `combine` makes, for this part, of the values that `compute()` has in all parts of the batch.

    `combine` runs outside of the parts, and `compute` must not exchange anything itself.
    """
    part = active_part()
    return combine([compute()])[0] if part is None else part.exchange(combine, compute)


def remember(compute: Callable[[], T]) -> T:
    """Return `compute()`, which a part that runs again does not compute again. Its value stays in memory meanwhile.

    For what takes long and is small, such as a selection. No gradient may flow through it.
    """
    part = active_part()
    return compute() if part is None else part.remember(compute)


def split_rows(x: Tensor) -> tuple[Tensor, ...]:
    """Split a whole batch into the parts in which a training step takes it: one, outside of `taken_in_parts`."""
    return x.tensor_split(min(_n_parts.get(), max(1, len(x))))


@contextmanager
def taken_in_parts(n: int) -> Iterator[None]:
    """Let `split_rows` make n parts inside the block."""
    token = _n_parts.set(n)
    try:
        yield
    finally:
        _n_parts.reset(token)


def run_parts(sizes: Sequence[int], run: Callable[[int], T]) -> list[T]:
    """Return what `run(i)` returns for each part i, run one after the other, as often as it takes.

    Args:
        sizes: rows of each part.
        run: runs a part from its start. It must ask for the same things in every part.
    """
    parts = [Part(i, len(sizes), size, sum(sizes)) for i, size in enumerate(sizes)]
    while True:
        done, waiting = list[T](), list[tuple[Combine, Any]]()
        for part in parts:
            try:
                with part.active():
                    done.append(run(part.index))
            except Waiting as wait:
                waiting.append((wait.combine, wait.given))
        if not waiting:
            return done
        assert not done, "some parts of a batch ask for more than others"
        told = waiting[0][0]([given for _, given in waiting])
        for part, value in zip(parts, told, strict=True):
            part.known.append((part.depth, value))
