"""What n processes that train one SAE must tell each other; a process alone gets back what it gave.

Process number r, its rank, trains on the r-th of n equal consecutive shares of every batch, and gradients are averaged
before anything is done with them. Loss terms are means over rows, so that this is the gradient of the whole batch.
What looks at the batch in any other way (a choice among all its entries, a count, a ratio of two means) asks here.
Every process gets the same bits, hence takes the same step.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

TIMEOUT = timedelta(minutes=30)  # for any one exchange: the slowest waits for no more than a block's text


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


@contextmanager
def process_group(rank: int, n: int, store: dist.Store) -> Iterator[None]:
    """Inside, this process is number `rank` of n, each of which has a GPU of its own if there are as many."""
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= n
    if gpus:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_share(batch: Shaped[Tensor, "b *rest"]) -> Shaped[Tensor, "b/n *rest"]:
    """This rank's rows of a batch; where n does not divide it, up to n - 1 rows at its end are nobody's."""
    size = len(batch) // world_size()
    return batch[rank() * size : (rank() + 1) * size]


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over the ranks; carries no gradient."""
    if world_size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over the ranks, with this rank's gradient: averaged over the ranks, that is the gradient of the mean."""
    return x if world_size() == 1 else _Average.apply(x)


class _Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_ranks(x) / world_size()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def on_any_rank(x: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Where x is true on any rank."""
    return x if world_size() == 1 else sum_over_ranks(x.int()) > 0


def min_over_ranks(x: Tensor) -> Tensor:
    """The smallest that any rank has, entry by entry."""
    if world_size() == 1:
        return x
    y = x.to(torch.int32 if x.dtype == torch.int16 else x.dtype, copy=True)  # no back end knows int16
    dist.all_reduce(y, dist.ReduceOp.MIN)
    return y.to(x.dtype)


def concatenate_ranks(x: Shaped[Tensor, "n *rest"]) -> tuple[Shaped[Tensor, "m *rest"], slice]:
    """What all ranks have, in their order, and where in it this rank's part is; n may differ between them."""
    if world_size() == 1:
        return x, slice(None)
    sizes = torch.zeros(world_size(), dtype=torch.long, device=x.device)
    sizes[rank()] = len(x)
    n = sum_over_ranks(sizes).tolist()
    padded = x.new_zeros(max(n), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in n]
    dist.all_gather([as_bytes(part) for part in parts], as_bytes(padded))
    start = sum(n[: rank()])
    return torch.cat([part[:size] for part, size in zip(parts, n, strict=True)]), slice(start, start + len(x))


def broadcast_from(x: Tensor, source: int) -> None:
    """Put into x, which is contiguous, what it holds on rank `source`."""
    dist.broadcast(as_bytes(x), source)


def as_bytes(x: Tensor) -> Tensor:
    """The same memory as numbers that every back end can carry."""
    return x.view(-1).view(torch.uint8)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the ranks, all of which have one for the same parameters."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()
    for gradient in gradients:
        gradient /= world_size()
