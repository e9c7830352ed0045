"""Which device is meant, and what the time is when it has done all that it was given."""

import time

import torch


def chosen(device: str) -> str:
    """`auto` is CUDA where there is one, else the CPU; any other name is itself."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def now(device: torch.device) -> float:
    """Seconds; only differences mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
