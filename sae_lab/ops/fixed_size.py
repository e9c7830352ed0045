"""The mode in which no shape of a training step depends on data and the host reads no number back.

A step in this mode can be captured as a CUDA graph. Codes of the top-k family are padded to a fixed number of entries
(see `Pattern`), and dead latents to a number that the SAE's `plan_step` announces before the step.

The mode is for GPUs, where a host that reads one number waits for all kernels before it. On a CPU there is nothing to
wait for, and shapes that follow the data are faster, because numpy can search and partition. Tests turn the mode on
there as well, to compare both forms and to trace a step with fake tensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_MODE: ContextVar[bool] = ContextVar("fixed_size", default=False)


@contextmanager
def fixed_size(on: bool = True) -> Iterator[None]:
    """Turn the mode on or off inside the block."""
    token = _MODE.set(on)
    try:
        yield
    finally:
        _MODE.reset(token)


def is_fixed_size() -> bool:
    """Return whether shapes must not depend on data."""
    return _MODE.get()


def numpy_may_read(x: Tensor) -> bool:
    """Return whether numpy may read the tensor: on a CPU, outside this mode."""
    return x.device.type == "cpu" and not is_fixed_size()


def true_positions_padded(mask: Bool[Tensor, " m"], n: int) -> Int[Tensor, " n"]:
    """Return the ascending positions where a mask is true, at most n, followed by m where there are fewer."""
    m = len(mask)
    place = torch.where(mask, mask.cumsum(0) - 1, n).clamp_max(n)  # the others share a place that is cut off
    return torch.full((n + 1,), m, device=mask.device).scatter_(0, place, torch.arange(m, device=mask.device))[:n]
