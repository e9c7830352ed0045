"""The resolver `share_of_steps`: settings of an SAE that are counted in training batches, as shares of the run."""

import math

from omegaconf import DictConfig


def share_of_steps(share: float, *, _root_: DictConfig) -> int:
    """Return how many training batches a share of the run is.

    A run has `n_steps` batches where its command has that option, and ceil(n_tokens / batch_size) in `train`. A command
    that has neither measures single steps; there a run is taken to have 1,000.
    """
    if "n_steps" in _root_:
        n_steps = _root_["n_steps"]
    else:
        n_steps = math.ceil(_root_["n_tokens"] / _root_["batch_size"]) if "n_tokens" in _root_ else 1000
    return round(share * n_steps)
