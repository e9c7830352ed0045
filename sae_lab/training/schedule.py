"""Learning-rate schedules: functions from step to factor."""

from typing import Any

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
