"""The device, the precision, and a clock that waits for the device."""

import time
from typing import Any

import torch

from sae_lab.runtime.errors import UserError


def resolve_device(device: str) -> str:
    """Return the device to use: `auto` becomes `cuda` if there is a GPU, else `cpu`; other names stay.

    Raises:
        UserError: CUDA is asked for and there is no GPU.
    """
    found = torch.cuda.is_available()
    if device.startswith("cuda") and not found:
        raise UserError(f"device {device} is not available, because torch finds no GPU: give auto or cpu.")
    return ("cuda" if found else "cpu") if device == "auto" else device


def checked_precision(name: str, precision: str) -> Any:
    """Return `precision`, the value of the setting `name`, if it keeps parameters in float32.

    In bf16, an Adam step of 1e-4 would be rounded away.

    Raises:
        UserError: it is neither 32-true nor bf16-mixed.
    """
    known = {"32-true": "all in float32", "bf16-mixed": "products in bfloat16"}
    if precision not in known:
        words = " or ".join(f"{name} ({meaning})" for name, meaning in known.items())
        raise UserError(f"{name}={precision} is not known: choose {words}.")
    return precision


def synchronized_time(device: torch.device) -> float:
    """Wait until `device` is idle and return the time in seconds. Only differences are meaningful."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
