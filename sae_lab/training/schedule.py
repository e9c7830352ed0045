"""Learning-rate schedules: functions from step to factor."""

import math
from typing import Annotated, Any

from annotated_types import Ge, Le

from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError


def warmup_decay(step: int, n_steps: int, warmup: float, decay: float) -> float:
    """Return the factor of the learning rate: linear warm-up, constant, linear decay to zero.

        min((step + 1) / (warmup · n_steps), 1, (n_steps - step) / (decay · n_steps))

    Args:
        warmup: share of the steps, from 0 (no warm-up) to 1.
        decay: share of the steps, from 0 (no decay) to 1.

    Raises:
        UserError: warmup or decay is not a share of the steps, or the two overlap.
    """
    check_shares(n_steps, warmup=warmup, decay=decay)
    up = (step + 1) / (warmup * n_steps) if warmup else 1.0
    down = (n_steps - step) / (decay * n_steps) if decay else 1.0
    return max(0.0, min(1.0, up, down))


@check_arguments
def cosine(
    step: int,
    n_steps: int,
    warmup: float,
    final: Annotated[float, Ge(0), Le(1)] = 0.0,
    cycles: Annotated[int, Ge(1)] = 1,
    growth: Annotated[float, Ge(1)] = 1.0,
) -> float:
    """Return the factor of the learning rate: linear warm-up, then cosine decay, restarted `cycles - 1` times.

        final + (1 - final) · (1 + cos(π u)) / 2        u: share of the current cycle that is over, from 0 to 1

    Each cycle starts at the full rate and is `growth` times as long as the one before it; the last one ends with the
    run. Loshchilov, Hutter 2017, arXiv 1608.03983. Without warm-up the factors are those of CosineAnnealingLR and
    CosineAnnealingWarmRestarts of torch.optim.lr_scheduler, whose cycles are given in steps.

    Args:
        warmup: share of the steps, from 0 (no warm-up) to 1.
        final: factor at the end of a cycle, from 0 to 1.
        cycles: number of cycles.
        growth: ratio of the lengths of consecutive cycles.

    Raises:
        UserError: warmup is not a share of the steps, or another argument is out of range.
    """
    check_shares(n_steps, warmup=warmup)
    if step < warmup * n_steps:
        return min(1.0, (step + 1) / (warmup * n_steps))
    lengths = [growth**i for i in range(cycles)]
    left = (step - warmup * n_steps) / max(1, n_steps - warmup * n_steps) * sum(lengths)
    while len(lengths) > 1 and left >= lengths[0] - 1e-9:
        left -= lengths.pop(0)
    share = min(1.0, max(0.0, left / lengths[0]))
    return final + (1 - final) * (1 + math.cos(math.pi * share)) / 2


def check_shares(n_steps: int, **shares: Any) -> None:
    """Raise a UserError unless the shares are in [0, 1] and sum to at most 1.

    Other libraries take warm-up in steps; here warmup=1000 would keep the rate near zero.
    """
    for name, share in shares.items():
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0 <= share <= 1:
            wanted = share if number and 1 < share <= n_steps else max(1, n_steps // 20)
            raise SettingError(
                f"{{{name}}}={'null' if share is None else share} must be a share of the run's steps, from 0 to "
                f"1: for {wanted:,} of its {n_steps:,} steps type {{{name}}}={wanted / n_steps:.2g}."
            )
    if sum(shares.values()) > 1 + 1e-9:
        given = " and ".join(f"{{{name}}}={share}" for name, share in shares.items())
        raise SettingError(f"{given} are shares of the run's steps and sum to more than 1: lower one of them.")
