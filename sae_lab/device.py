"""Which device is meant, and what the time is when it has done all that it was given."""

import time

import torch

from sae_lab.errors import UserError


def chosen(device: str) -> str:
    """`auto` is CUDA where there is one, else the CPU; any other name is itself.

    Raises:
        UserError: CUDA where there is none.
    """
    found = torch.cuda.is_available()
    if device.startswith("cuda") and not found:
        raise UserError(f"device {device} is not there: torch sees no GPU; give auto or cpu.")
    return ("cuda" if found else "cpu") if device == "auto" else device


def now(device: torch.device) -> float:
    """Seconds; only differences mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
