"""Communication between ranks with different rows of a batch. With one rank every function is the identity.

The r-th of n ranks trains on the r-th of n equal consecutive shares of every batch, and gradients are averaged before
anything reads them (see mesh.py for ranks that hold different latents). Loss terms are means over rows, so the average
is the gradient of the whole batch. Code that depends on the batch in any other way (a selection among all its entries,
a count, a ratio of two means) must use the functions here. All ranks get the same bits, so all take the same step.

A process may also train on consecutive parts of its share, one after the other (see parts.py). Then every function here
is over all parts of all ranks. Parts may differ in their number of rows; means take that into account.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Shaped
from torch import Tensor

from sae_lab.parallel.mesh import data_axis, rank, world_size
from sae_lab.parallel.parts import active_part, exchange


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum over ranks, without a gradient."""
    if active_part() is not None:
        return exchange(lambda given: len(given) * [sum_over_ranks(reduce(torch.add, given))], x.detach)
    if data_axis().size == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, group=data_axis().group)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean over ranks. Its gradient is this rank's, whose average over ranks is the gradient of the mean."""
    return x if data_axis().size == 1 else _Average.apply(x)


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        part = active_part()
        return sum_over_ranks(x if part is None else x * part.weight) / data_axis().size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def on_any_rank(x: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Return where x is true on at least one rank."""
    return x if data_axis().size == 1 else sum_over_ranks(x.int()) > 0


def min_over_ranks(x: Tensor) -> Tensor:
    """Return the elementwise minimum over ranks."""
    if active_part() is not None:
        return exchange(lambda given: len(given) * [min_over_ranks(reduce(torch.minimum, given))], x.detach)
    if data_axis().size == 1:
        return x
    y = x.to(torch.int32 if x.dtype == torch.int16 else x.dtype, copy=True)  # no back end supports int16
    dist.all_reduce(y, dist.ReduceOp.MIN, data_axis().group)
    return y.to(x.dtype)


def concatenate_ranks(x: Shaped[Tensor, "n *rest"]) -> tuple[Shaped[Tensor, "m *rest"], slice]:
    """Concatenate x over ranks, in their order. Returns the whole and the slice of it that is this rank's x.

    n may differ between ranks.
    """
    if active_part() is not None:
        return exchange(concatenate_parts, x.detach)
    if data_axis().size == 1:
        return x, slice(None)
    axis = data_axis()
    own_size = torch.zeros(axis.size, dtype=torch.long, device=x.device)
    own_size[axis.index] = len(x)
    sizes = sum_over_ranks(own_size).tolist()
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather([view_as_bytes(part) for part in parts], view_as_bytes(padded), axis.group)
    start = sum(sizes[: axis.index])
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), slice(start, start + len(x))


def exchange_rows(
    into: Shaped[Tensor, "n *rest"],
    parts: Sequence[Shaped[Tensor, "_ *rest"]],
    n_received: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Send parts[q] to rank q of a group (None: all), and receive n_received[q] rows from it: into `into`, by rank.

    The parts may lie on another device; `into` must be contiguous.
    """
    if len(parts) == 1:
        into.copy_(parts[0])
        return
    outgoing, sizes = torch.cat([part.to(into.device) for part in parts]), [len(part) for part in parts]
    dist.all_to_all_single(rows_as_bytes(into), rows_as_bytes(outgoing), list(n_received), sizes, group)


def rows_as_bytes(x: Shaped[Tensor, "n *rest"]) -> Tensor:
    """View the same memory as uint8, row by row."""
    return x.view(len(x), x.shape[1:].numel()).view(torch.uint8)


def gather_counts(n: int) -> list[int]:
    """Return the n of every rank of all. The host does not wait for a GPU."""
    counts = torch.zeros(world_size(), dtype=torch.long)
    counts[rank()] = n
    if world_size() > 1:
        dist.all_reduce(counts)
    return counts.tolist()


def gather_rows(x: Shaped[Tensor, "n *rest"]) -> Shaped[Tensor, "m *rest"]:
    """Concatenate x over ranks, for a loss of the whole batch: the average of gradients over ranks is its gradient."""
    return x if data_axis().size == 1 else _Gather.apply(x)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        whole, ctx.own = concatenate_ranks(x)
        part = active_part()
        ctx.factor = data_axis().size / (1 if part is None else part.weight)  # undone by the average
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad[ctx.own] * ctx.factor


def concatenate_parts(given: list[Tensor]) -> list[tuple[Tensor, slice]]:
    """Return `concatenate_ranks` for each part of this rank's batch."""
    whole, own = concatenate_ranks(torch.cat(given))
    stops = list(accumulate(map(len, given), initial=own.start or 0))
    return [(whole, slice(start, stop)) for start, stop in pairwise(stops)]


def view_as_bytes(x: Tensor) -> Tensor:
    """View the same memory as uint8, which every back end supports."""
    return x.view(-1).view(torch.uint8)
