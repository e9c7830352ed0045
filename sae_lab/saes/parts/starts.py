"""Where biases start: at statistics of the first training batch."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LATENTS_AT_ONCE = 1024


def geometric_median(x: Float[Tensor, "b s d"], tolerance: float = 1e-6, most: int = 100) -> Float[Tensor, "s d"]:
    """Return the point of each source whose mean distance to its rows is least, by Weiszfeld's iteration.

        m <- sum_i w_i x_i / sum_i w_i,   w_i = 1 / |x_i - m|

    A few huge rows, such as those of BOS, move it less than they move the mean.

    Args:
        x: the rows.
        tolerance: stop when every m moves by less than this share of the mean distance.
        most: maximum number of iterations.
    """
    median = x.mean(dim=0)
    for _ in range(most):
        distance = torch.linalg.vector_norm(x - median, dim=-1, keepdim=True)
        weights = 1 / distance.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)  # a row may lie at m
        before, median = median, (weights * x).sum(dim=0) / weights.sum(dim=0)
        moved = torch.linalg.vector_norm(median - before, dim=-1, keepdim=True)
        if (moved <= tolerance * distance.mean(dim=0)).all():
            break
    return median


B_DEC: dict[str, Callable[[Float[Tensor, "b s d"]], Float[Tensor, "s d"]]] = {
    "mean": lambda x: x.mean(dim=0),
    "geometric_median": geometric_median,
}
"""Starts of b_dec other than zeros: functions of the rows that x_hat is compared with."""


def level_exceeded_by(share: float, x: Float[Tensor, "b n"], W: Float[Tensor, "f n"]) -> Float[Tensor, " f"]:
    """Return, for each latent, a number that x Wᵀ exceeds on that share of the rows, but on one row at least.

    It lies halfway between the values of two rows, so that rounding decides nothing.
    """
    n = min(max(1, round(share * len(x))), len(x) - 1)
    return torch.cat([(x @ rows.T).topk(n + 1, dim=0).values[-2:].mean(dim=0) for rows in W.split(LATENTS_AT_ONCE)])
