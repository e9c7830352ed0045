"""The device, copies to and from it, the precision, and a clock that waits for the device."""

import os
import time
from typing import Annotated, Any, Literal, TypeAlias

import torch
from torch import Tensor

from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.errors import SettingError

Precision: TypeAlias = Annotated[
    Literal["32-true", "bf16-mixed", "16-mixed"],
    ErrorMessage(
        "is not known: choose 32-true (all in float32), bf16-mixed (products in bfloat16) or 16-mixed (products in "
        "float16, on a GPU)"
    ),
]
"""Of the computation; parameters stay in float32: an Adam step of 1e-4 would be lost on a weight in bfloat16."""


def resolve_device(device: str, setting: str = "device") -> str:
    """Return the device to use: `auto` becomes `cuda` if there is a GPU, else `cpu`; other names stay.

    Raises:
        SettingError: CUDA is asked for and there is no GPU. It names the argument `setting`.
    """
    found = torch.cuda.is_available()
    if device.startswith(("cuda", "gpu")) and not found:
        raise SettingError(f"{{{setting}}}={device} is not available, because torch finds no GPU: give auto or cpu.")
    return ("cuda" if found else "cpu") if device == "auto" else device


def use_gpu_of_local_rank() -> None:
    """Let `cuda` mean a GPU of this process's own, where torchrun or srun started several processes on this machine."""
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    if rank is not None and torch.cuda.is_available():
        torch.cuda.set_device(int(rank) % torch.cuda.device_count())


def send(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. The host does not wait for a GPU: a copy from the CPU comes from pinned memory.

    From other memory, torch makes the host wait until everything that was launched before on the stream has run.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)  # torch frees pinned memory after the copy
    return x.to(device, non_blocking=device.type == "cuda")


class Reading:
    """Numbers that a device computes, on their way to the host, which waits for them in `wait` only.

    Args:
        numbers: a tensor. What it holds later does not matter.
    """

    def __init__(self, numbers: Tensor):
        self._numbers = numbers.detach().to("cpu", non_blocking=True, copy=True)  # from a GPU to pinned memory
        self._done = torch.cuda.current_stream(numbers.device).record_event() if numbers.is_cuda else None

    def wait(self) -> list[Any]:
        """Wait until the numbers and what was launched before them are computed, and return them."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[Any] = self._numbers.tolist()
        return numbers


def synchronized_time(device: torch.device) -> float:
    """Wait until `device` is idle and return the time in seconds. Only differences are meaningful."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
