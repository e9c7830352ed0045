"""The devices of a language model's copies (`lm.devices`), and how a module is copied to another device."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from typing import Annotated

import torch
from annotated_types import Len
from torch import nn

from sae_lab.parallel.environment import place
from sae_lab.parallel.mesh import rank, world_size
from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.errors import SettingError, UserError

Devices = Annotated[
    Annotated[list[int | str], Len(1)] | None,
    ErrorMessage("must be a list of GPUs or devices, such as [4,5,6,7] or [cpu,cpu]"),
]


def device_names(devices: Sequence[int | str]) -> tuple[str, ...]:
    """Return the torch names of devices; a number is that GPU.

    Raises:
        SettingError: there is no such device.
    """
    return tuple(device_name(device) for device in devices)


def device_name(device: int | str) -> str:
    name = f"cuda:{device}" if isinstance(device, int) or device.isdecimal() else device
    try:
        found = torch.device(name)
    except RuntimeError as e:
        raise SettingError(
            f"{{devices}} has {device}, which is no device: give numbers of GPUs, such as [4,5,6,7]."
        ) from e
    n = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= n:
        there = f"GPUs 0 to {n - 1}" if n > 1 else "GPU 0" if n else "no GPU"
        raise SettingError(f"{{devices}} has {device}, but torch finds {there}: give others, or leave it out.")
    return name


def devices_of_rank(devices: Sequence[str]) -> tuple[str, ...]:
    """Return the devices on which this rank runs the language model: every n-th, for n ranks on this machine.

    Where there are fewer devices than ranks, ranks share a device.
    """
    here = place()
    i, n = (rank(), world_size()) if here is None else (here.local_rank, here.local_size)
    return tuple(devices[i % len(devices) :: n])


def copy_to(module: nn.Module, device: str) -> nn.Module:
    """Return a copy of a module whose weights are on a device. Weights that are there already are shared.

    Raises:
        UserError: the weights are quantised.
    """
    tensors = dict[int, torch.Tensor]()
    for tensor in chain(module.parameters(), module.buffers()):
        if type(tensor) not in (nn.Parameter, nn.Buffer, torch.Tensor) or type(tensor.data) is not torch.Tensor:
            raise UserError("lm.devices copies the language model, and quantised weights cannot be: give lm.device.")
        moved = tensor.data.to(device)
        is_parameter = isinstance(tensor, nn.Parameter)
        tensors[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    return deepcopy(module, tensors)
