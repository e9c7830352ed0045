"""State of Python that a training step depends on, which a CUDA graph keeps as it was when it was recorded."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = frozenset((bool, int, float, str, type(None)))


def baked_in(parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> Hashable:
    """Return the numbers and modes that a step may pass to kernels: those of modules, of the optimizer and of autocast.

    A step that changes one of them itself, such as a loss that counts its calls, never has the same ones twice.

    Args:
        parts: all modules of an SAE, itself included.
    """
    device = optimizer.param_groups[0]["params"][0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    options = [value for group in optimizer.param_groups for name, value in group.items() if name != "params"]
    places = [value.data_ptr() if isinstance(value, Tensor) else value for value in options]
    numbers = [value for part in parts for value in vars(part).values() if type(value) in PLAIN]
    return dtype, *places, *numbers


@contextmanager
def refuse_replacements(parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Raise a RuntimeError if a number or a tensor of the modules or of the optimizer's state is replaced in the block.

    A replay would not replace it. Also undoes replacements, of a block that fails for another reason, too.
    """
    owners = [owner for part in parts for owner in (vars(part), part._parameters, part._buffers)]
    owners += optimizer.state.values()
    before = [dict(owner) for owner in owners]
    memory = [(value, value.detach()) for owner in before for value in owner.values() if isinstance(value, Tensor)]
    replaced: list[str] = []
    try:
        yield
    finally:
        for owner, values in zip(owners, before, strict=True):
            if names := [name for name in {**values, **owner} if differs(values.get(name), owner.get(name))]:
                replaced += names
                owner.clear()
                owner.update(values)
        for tensor, numbers in memory:
            if tensor.data_ptr() != numbers.data_ptr():
                tensor.data = numbers
                replaced.append(f"the memory of a {tuple(tensor.shape)} tensor")
    if replaced:
        raise RuntimeError(f"a step replaces {', '.join(sorted(replaced))}, which a replay of it would not")


def differs(a: Any, b: Any) -> bool:
    """Return whether two values are not the same number or the same tensor."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is not b
    return type(a) in PLAIN and type(b) in PLAIN and a != b
