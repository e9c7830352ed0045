"""Exchanges between the ranks that hold different latents of one SAE (trainer.shard_latents).

Each of m ranks holds f/m consecutive latents: their parameters, optimizer state and counters. These ranks see the same
rows. Each encodes them with its own latents, and computes the same x_hat and the same loss from the sum of all parts.

Whatever is a sum or a choice over latents calls the functions here, most of it in ops/. Two of them have gradients, and
are each other's conjugate (f and g of Shoeybi et al. 2019, arXiv 1909.08053, §3):

    sum_over_shards    forward: sum over the shards    backward: identity, since all shards have the gradient of the sum
    shared_by_shards   forward: identity               backward: sum, since each shard reads x with its own latents

So the loss may use a sum over shards like any other tensor, and a parameter without an axis of latents has the same,
whole gradient on every shard. Without shards all functions return their argument itself.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from sae_lab.parallel.collectives import view_as_bytes
from sae_lab.parallel.mesh import latent_axis
from sae_lab.runtime.errors import SettingError


def own_share(name: str, n_latents: int, shardable: bool) -> range:
    """Return which of its n_latents latents this rank holds of an SAE.

    Args:
        name: of the SAE's class, for messages.
        shardable: whether its latents may be sharded.

    Raises:
        SettingError: they may not, or cannot be divided equally.
    """
    axis = latent_axis()
    check_shards(name, n_latents, shardable, axis.size)
    share = axis.share(n_latents)
    return range(share.start, share.stop)


def check_shards(name: str, n_latents: int, shardable: bool, m: int) -> None:
    """Raise a SettingError if an SAE cannot be divided into m shards; see own_share."""
    if m > 1 and not shardable:
        raise SettingError(
            f"the latents of a {name} cannot be sharded: give trainer.shard_latents=1, or another SAE, such as "
            "sae=batch_topk, topk, matryoshka or jumprelu."
        )
    if n_latents % m:
        raise SettingError(
            f"the number of latents, {n_latents}, must be a multiple of trainer.shard_latents={m}: change n_latents "
            "or expansion."
        )


def sum_over_shards(x: Tensor) -> Tensor:
    """Return the sum over shards. Its gradient goes to every shard's x as it is."""
    return x if latent_axis().size == 1 else _Sum.apply(x)


def shared_by_shards(x: Tensor) -> Tensor:
    """Return x, which all shards have and read with their own latents. Its gradient is the sum over shards."""
    return x if latent_axis().size == 1 else _Shared.apply(x)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _reduced(x, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _reduced(grad, dist.ReduceOp.SUM)


def _reduced(x: Tensor, operation: Any) -> Tensor:
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, operation, latent_axis().group)
    return x


def min_over_shards(x: Tensor) -> Tensor:
    """Return the elementwise minimum over shards, without a gradient."""
    return x if latent_axis().size == 1 else _reduced(x, dist.ReduceOp.MIN)


def max_over_shards(x: Tensor) -> Tensor:
    """Return the elementwise maximum over shards, without a gradient."""
    return x if latent_axis().size == 1 else _reduced(x, dist.ReduceOp.MAX)


def on_any_shard(x: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Return where x is true on at least one shard."""
    return x if latent_axis().size == 1 else sum_over_shards(x.int()) > 0


def mean_over_shards(x: Tensor) -> Tensor:
    """Return the mean over shards, which hold equally many latents."""
    return x if latent_axis().size == 1 else sum_over_shards(x) / latent_axis().size


def count_over_shards(n: int, device: torch.device) -> int:
    """Return the sum of a number over shards. The host waits for it."""
    return n if latent_axis().size == 1 else int(sum_over_shards(torch.tensor(n, device=device)))


def concatenate_shards(x: Shaped[Tensor, "*shape"], dim: int = 0) -> Shaped[Tensor, "*whole"]:
    """Concatenate tensors of one shape along an axis, in the order of the shards, without a gradient."""
    axis = latent_axis()
    if axis.size == 1:
        return x
    x = x.detach().movedim(dim, 0).contiguous()
    whole = x.new_empty(axis.size * len(x), *x.shape[1:])
    dist.all_gather([view_as_bytes(part) for part in whole.chunk(axis.size)], view_as_bytes(x), axis.group)
    return whole.movedim(0, dim)


def clip_gradients(parameters: Iterable[tuple[nn.Parameter, bool]], max_norm: float) -> None:
    """Scale all gradients such that their joint norm, over all shards, is at most max_norm.

    Args:
        parameters: each with whether it is sharded. The others have the same gradient on every shard.
    """
    given = list(parameters)
    if latent_axis().size == 1:
        nn.utils.clip_grad_norm_([p for p, _ in given], max_norm)
        return
    of_shard, of_all = ([p for p, is_sharded in given if is_sharded is which] for which in (True, False))
    squares = sum_over_shards(norm_of_gradients(of_shard).square()) + norm_of_gradients(of_all).square()
    nn.utils.clip_grads_with_norm_([p for p, _ in given], max_norm, squares.sqrt())


def norm_of_gradients(parameters: Iterable[nn.Parameter], order: float = 2.0) -> Tensor:
    """Return the joint norm of the gradients of some parameters."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], order)


def share_overflow(parameters: Iterable[nn.Parameter]) -> None:
    """Make all gradients infinite on every shard if one is not finite on any.

    A GradScaler sees the gradients of its own process. Shards that disagreed would not take the same steps.
    """
    if latent_axis().size == 1:
        return
    given = list(parameters)
    overflow = on_any_shard(~norm_of_gradients(given, torch.inf).isfinite())
    for p in given:
        if p.grad is not None:
            p.grad.masked_fill_(overflow, torch.inf)


def gather_over_shards(value: Any) -> list[Any]:
    """Return a value of every rank that holds other latents, in their order. For small values: they are pickled."""
    axis = latent_axis()
    if axis.size == 1:
        return [value]
    values = [None] * axis.size
    dist.all_gather_object(values, value, axis.group)
    return values
