"""Which device and precision are meant, and what the time is when a device has done all that it was given."""

import time
from typing import Any

import torch

from sae_lab.runtime.errors import UserError


def resolve_device(device: str) -> str:
    """`auto` is CUDA where there is one, else the CPU; any other name is itself.

    Raises:
        UserError: CUDA where there is none.
    """
    found = torch.cuda.is_available()
    if device.startswith("cuda") and not found:
        raise UserError(f"device {device} is not there: torch sees no GPU; give auto or cpu.")
    return ("cuda" if found else "cpu") if device == "auto" else device


def checked_precision(name: str, precision: str) -> Any:
    """`precision`, the value of the setting `name`, if parameters stay in float32 under it.

    An Adam step of 1e-4 would be lost on a weight in bf16.

    Raises:
        UserError: they do not, or it is an unknown word.
    """
    known = {"32-true": "all in float32", "bf16-mixed": "products in bfloat16"}
    if precision not in known:
        words = " or ".join(f"{name} ({meaning})" for name, meaning in known.items())
        raise UserError(f"{name}={precision} is not known: choose {words}.")
    return precision


def synchronized_time(device: torch.device) -> float:
    """Seconds; only differences mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
