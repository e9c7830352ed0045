"""What is wrong with metrics, in sentences: numbers that are not finite, numbers left out, signs of a useless SAE."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.plain_text import plural


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Check that every number is finite. What the data leave undefined is not among the metrics but in `left_out`.

    Raises:
        UserError: a number is NaN or infinite; the message names all that are.
    """
    if wrong := not_finite(metrics):
        raise UserError(
            f"{', '.join(wrong)}, although the activations are finite, so the SAE's weights or the language model "
            "with x_hat in it overflow: lower optimizer.lr, or give lm.dtype=float32."
        )


def not_finite(metrics: Mapping[str, Any]) -> list[str]:
    """Return a phrase for each number that is NaN or infinite, such as `fvu is nan`."""
    return [f"{name} is {value}" for name, value in numbers(metrics) if not math.isfinite(value)]


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a metrics.json by name, nested ones as outer/inner."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


FEW_STEPS = 1000
"""Steps below which dead latents are put down to the number of steps."""


def find_too_few_steps(metrics: Mapping[str, Any], n_steps: int) -> str | None:
    """Return a sentence if most latents are dead after a short training; else None."""
    if n_steps >= FEW_STEPS or metrics["dead_fraction"] <= 0.5:
        return None
    return (
        f"after only {plural(n_steps, 'step')} {metrics['dead_fraction']:.0%} of the latents are active on no held-out "
        "token: give more n_tokens or a smaller batch_size"
    )


def find_problems(metrics: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each metric that is left out, and for each sign that the SAE is of no use.

    Args:
        metrics: the content of a metrics.json, with `n_latents`; other metrics may be missing.
    """
    reasons: dict[str, list[str]] = {}
    for name, reason in metrics.get("left_out", {}).items():
        reasons.setdefault(reason, []).append(name)
    problems = [f"{', '.join(names)} left out: {reason}" for reason, names in reasons.items()]
    if wanted := metrics.get("n_eval_tokens_wanted"):
        problems.append(
            f"evaluated on {metrics['n_held_out_tokens']:,} held-out tokens, all there are, and not on {wanted:,}: "
            "give more data, hold out more of them, or lower data.n_eval_tokens"
        )
    l0, n_latents = metrics.get("l0"), metrics.get("n_latents")
    if l0 == 0:
        l0_in_training = metrics.get("train_mode", {}).get("l0", 0)
        problems.append(
            f"l0 is 0, but {l0_in_training:.4g} under the training rule: the threshold is above every pre-activation"
            if l0_in_training
            else f"l0 is 0: no latent is active on any held-out token, and all {n_latents} latents are dead"
        )
    elif l0 is not None and l0 == n_latents:
        problems.append(f"l0 equals n_latents={n_latents}: every latent is active on every held-out token")
    return problems
