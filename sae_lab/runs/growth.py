"""Whether a run may continue to a larger n_tokens: only if none of its steps would have been another one."""

from collections.abc import Mapping
from typing import Any

SIZES = ("n_tokens", "data.n_tokens")
CONSTANT = {
    "schedule._target_": "sae_lab.training.schedule.warmup_decay",
    "schedule.warmup": 0,
    "schedule.decay": 0,
}


def reason_not_to_grow(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """Return why a run of the config `there` cannot continue as one of `here`; None if it can.

    Args:
        there, here: flattened configs, which differ in n_tokens.
    """
    n, more = there.get("n_tokens"), here.get("n_tokens")
    if not (isinstance(n, int) and isinstance(more, int)) or more < n:
        return "n_tokens can only grow"
    if any(there.get(key) != value for key, value in CONSTANT.items()) or there.get("optimizer.lr") == "auto":
        return "the learning rate depends on n_tokens, unless schedule=constant and optimizer.lr is a number"
    if n < there.get("data.block_tokens", 0):
        return "a run shorter than data.block_tokens shuffles fewer activations together"
    return None


def ends_with_smaller_batch(there: Mapping[str, Any], step: int) -> bool:
    """Return whether the step was the last one of the run `there`, of a batch that was not full."""
    return step * there["batch_size"] > there["n_tokens"]
