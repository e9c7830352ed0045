"""The learning rate of `optimizer.lr=auto`."""

import math

from omegaconf import DictConfig

from sae_lab.runtime.errors import SettingError

HIGHEST = 1e-2


def automatic_rate(d: int, n_latents: int, n_steps: int) -> float:
    """Return a learning rate for Adam, for a run with warm-up and decay.

        lr = 10 / sqrt(d · sqrt(f) · steps)       at least 2e-4 · sqrt(2^14 / f), at most 0.01

    The first term is a fit to rates found on activations of two language models and of one attention head: d 64, 128
    and 576, f 1,024 to 4,608, 61 to 1,954 steps (docs/learning-rate.md). The batch size has no part in it, other than
    through the number of steps. The lower bound is the rule of OpenAI's code and of dictionary_learning, which others
    found for runs of 100,000 steps (Gao et al. 2024, arXiv 2406.04093): a longer run needs no lower rate.

    Args:
        d: width of an activation.
        n_latents: f.
        n_steps: number of training steps, which is that of the schedule.
    """
    short = 10 / math.sqrt(d * math.sqrt(n_latents) * n_steps)
    return min(HIGHEST, max(short, 2e-4 * math.sqrt(2**14 / n_latents)))


def resolve_rate(optimizer: DictConfig, d: int, n_latents: int, n_steps: int) -> dict[str, float]:
    """Return the arguments that replace `lr: auto` in the config of an optimizer; none if lr is a number.

    Raises:
        SettingError: the optimizer is none of Adam's family.
    """
    if optimizer.get("lr") != "auto":
        return {}
    name = str(optimizer.get("_target_")).rpartition(".")[2]
    if "Adam" not in name:
        raise SettingError(f"optimizer.lr=auto is a rate for Adam, not for {name}: give optimizer.lr a number.")
    return {"lr": automatic_rate(d, n_latents, n_steps)}
