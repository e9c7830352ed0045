"""The time, when a device has done all that it was given."""

import time

import torch


def now(device: torch.device) -> float:
    """Seconds; only differences mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
