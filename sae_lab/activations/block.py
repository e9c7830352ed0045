"""The part of a block of shuffled rows that a rank trains on, and how the rows get there."""

from mmap import mmap
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.parallel.collectives import exchange_rows
from sae_lab.parallel.mesh import data_axis, latent_axis, rank, world_size
from sae_lab.runtime.device import send


class Layout:
    """Which rows of a block each rank trains on: its share of every batch.

    Every rank knows it, because it is a function of the block's permutation.

    Args:
        order: the permutation of the block. Its consecutive parts of `batch_size` are the batches.
        n_wanted: rows that the run takes, which may cut a batch; None: all. Every row has an owner all the same.

    Attributes:
        owner: place on the data axis of the ranks that hold each row of the block.
        batches: rows of each batch that this rank trains on, as places among the rows that it holds.
    """

    def __init__(self, order: Int[Tensor, " n"], batch_size: int, n_wanted: int | None = None):
        axis, slots = data_axis(), torch.arange(len(order))
        first = slots // batch_size * batch_size
        end = (first + batch_size).clamp(max=len(order))
        if n_wanted is not None:
            end = torch.where(first < n_wanted, end.clamp(max=n_wanted), end)
        share = (end - first) // axis.size
        of_slot = ((slots - first) // share.clamp(min=1)).clamp(max=axis.size - 1)
        self.owner = torch.empty_like(order).scatter_(0, order, of_slot)
        mine = (of_slot == axis.index) & (slots < first + share * axis.size)
        held = (self.owner == axis.index).cumsum(0) - 1
        self.n_held = int(held[-1]) + 1
        self.batches = held[order[mine]].split(share[::batch_size].tolist())


class Piece(NamedTuple):
    """Consecutive rows of a block, where they begin in it, and the rank that computed them: meta on the others."""

    start: int
    rows: Float[Tensor, "n s d"]
    rank: int


class Block:
    """The rows of a block that this rank trains on, in the order of the block. All blocks reuse the same memory.

    Each row goes from the rank that computed it to the ranks of one row of the mesh, which train on it. Rows that
    follow one another in the text are computed by rank 0, 1, ..., so those that a rank receives together are in order.

    Args:
        device: where the rows lie; None: where the first ones do.
    """

    def __init__(self, device: torch.device | None):
        self.device = device
        self.close()

    def close(self) -> None:
        """Free the memory."""
        self._memory: Any = None
        self._batches: tuple[Tensor, ...] = ()

    def begin(self, layout: Layout) -> None:
        self._layout = layout
        self.filled = self._held = 0
        self._pieces: list[Piece] = []
        self._batches = ()

    def put(self, rows: Float[Tensor, "n s d"], source: int) -> None:
        """Append rows that the rank `source` computed; on the other ranks they are meta."""
        if self._memory is None or len(self._memory) < self._layout.n_held:
            self._memory = None
            self._memory = allocate(rows, self._layout.n_held, self.device or rows.device)
        if self._pieces and source <= self._pieces[-1].rank:
            self._exchange()
        self._pieces.append(Piece(self.filled, rows, source))
        self.filled += len(rows)
        if world_size() == 1:
            self._exchange()

    def finish(self, layout: Layout) -> None:
        """Be ready for `batch`. The layout differs from that of `begin` if there are fewer rows than were expected."""
        self._exchange()
        if len(layout.owner) < len(self._layout.owner):
            self._hand_over(self._layout.owner[: self.filled], layout.owner)
        self._layout = layout
        # On the block's device at once: a copy for each batch would make the host wait for the GPU each time.
        sizes = [len(batch) for batch in layout.batches]
        self._batches = send(torch.cat(layout.batches), self._memory.device).split(sizes)

    @property
    def n_batches(self) -> int:
        return len(self._batches)

    def batch(self, i: int) -> Float[Tensor, "b s d"]:
        """Return a copy of this rank's share of a batch."""
        return self._memory[self._batches[i]]

    def _exchange(self) -> None:
        """Send the pieces that are here, each of another rank, to the ranks that train on them."""
        assert self._memory is not None
        n_received = [0] * world_size()
        parts = [self._memory[:0]] * data_axis().size
        for start, rows, source in self._pieces:
            owner = self._layout.owner[start : start + len(rows)]
            n_received[source] = int((owner == data_axis().index).sum())
            if source == rank():
                parts = rows_by_owner(rows, owner)
        into = self._memory[self._held : self._held + sum(n_received)]
        # Rank r is in row r // m of the mesh, so consecutive ranks of a row get the same rows.
        exchange_rows(into, [part for part in parts for _ in range(latent_axis().size)], n_received)
        self._held += len(into)
        self._pieces = []

    def _hand_over(self, held: Int[Tensor, " n"], wanted: Int[Tensor, " n"]) -> None:
        """Send each row of the block from the rank that `held` names to the one that `wanted` names."""
        axis = data_axis()
        if axis.size == 1:
            return
        assert self._memory is not None
        received = [((held == i) & (wanted == axis.index)).nonzero().flatten() for i in range(axis.size)]
        parts = rows_by_owner(self._memory[: self._held], wanted[held == axis.index])
        places = torch.cat(received)
        into = self._memory.new_empty(len(places), *self._memory.shape[1:])
        exchange_rows(into, parts, [len(part) for part in received], axis.group)
        self._memory = into[send(places.argsort(), into.device)]


def rows_by_owner(rows: Float[Tensor, "n s d"], owner: Int[Tensor, " n"]) -> list[Float[Tensor, "m s d"]]:
    """Return the rows of each owner, in their order."""
    n = data_axis().size
    if n == 1:
        return [rows]
    order = rows.index_select(0, send(owner.argsort(stable=True), rows.device))
    return list(order.split(owner.bincount(minlength=n).tolist()))


def allocate(rows: Float[Tensor, "n s d"], n: int, device: torch.device) -> Float[Tensor, "m s d"]:
    """Allocate memory for n rows of the shape and dtype of `rows` on a device.

    On a CPU the block is mapped with mmap instead of taken from the C library's heap. There, small tensors fragmented
    the memory of a freed block, so the block for the threshold calibration needed new memory: a run took two blocks.
    """
    shape = (n, *rows.shape[1:])
    if device.type != "cpu" or n == 0:
        return torch.empty(shape, dtype=rows.dtype, device=device)
    pages = mmap(-1, n * rows.shape[1:].numel() * rows.element_size())
    return torch.frombuffer(pages, dtype=rows.dtype).view(shape)
