"""State of Python that a training step depends on, which a CUDA graph keeps as it was when it was recorded."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NUMBERS = frozenset((bool, int, float, str))
SEQUENCES = frozenset((list, tuple))


def numbers_of(parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> Hashable:
    """Return the numbers and modes that a step may pass to kernels: of modules, of the optimizer and of autocast.

    A step that changes one of them itself, such as a loss that counts its calls, never has the same ones twice. Numbers
    in lists and tuples are seen, and how many hooks a module has; other objects are not.

    Args:
        parts: all modules of an SAE, itself included.
    """
    device = optimizer.param_groups[0]["params"][0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    settings = [value for group in optimizer.param_groups for name, value in group.items() if name != "params"]
    modes = [part.training for part in parts]
    modes += [p.requires_grad for part in parts for p in part._parameters.values() if p is not None]
    return dtype, *numbers_of_modules(parts), *map(numbers_in, settings), *modes


def numbers_of_modules(parts: Sequence[nn.Module]) -> list[Hashable]:
    """Return the numbers that are attributes of modules, and the sizes of dictionaries, such as those of hooks.

    Without `training`, which a validation between two steps turns off and on.
    """
    values = [value for part in parts for name, value in vars(part).items() if name != "training"]
    known = NUMBERS | SEQUENCES
    return [numbers_in(v) if type(v) in known else len(v) for v in values if type(v) in known or isinstance(v, dict)]


def numbers_in(value: Any) -> Hashable:
    """Return a number or a string as it is, those of a list or a tuple as a tuple, and None for anything else."""
    if type(value) in SEQUENCES:
        return tuple(map(numbers_in, value))
    return value if type(value) in NUMBERS else None


def addresses_of(parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> list[int]:
    """Return where the tensors of modules and of an optimizer lie: a replay reads and writes the places of before."""
    owners = [*owners_of(parts, optimizer), *optimizer.param_groups]
    tensors = [value for owner in owners for value in owner.values() if isinstance(value, Tensor)]
    tensors += [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [tensor.data_ptr() for tensor in tensors]


def owners_of(parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the dictionaries that hold numbers and tensors of modules and of an optimizer's state."""
    owners = [owner for part in parts for owner in (vars(part), part._parameters, part._buffers)]
    return owners + list(optimizer.state.values())


@contextmanager
def refuse_replacements(parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Raise a RuntimeError if a number or a tensor of the modules or of the optimizer's state is replaced in the block.

    A replay would not replace it. Also undoes replacements, of a block that fails for another reason, too.
    """
    owners = owners_of(parts, optimizer)
    before = [dict(owner) for owner in owners]
    values = [value for owner in before for value in owner.values()]
    memory = [(value, value.detach()) for value in values if isinstance(value, Tensor)]
    lists = [(value, list(value)) for value in values if isinstance(value, list)]
    replaced: list[str] = []
    try:
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            if names := [name for name in {**old, **owner} if differs(old.get(name), owner.get(name))]:
                replaced += names
                owner.clear()
                owner.update(old)
        for tensor, place in memory:
            if tensor.data_ptr() != place.data_ptr():
                tensor.data = place
                replaced.append(f"the memory of a {tuple(tensor.shape)} tensor")
        for changed, items in lists:
            if numbers_in(changed) != numbers_in(items):
                changed[:] = items
                replaced.append("an item of a list")
    if replaced:
        raise RuntimeError(f"a step replaces {', '.join(sorted(replaced))}, which a replay of it would not")


def differs(a: Any, b: Any) -> bool:
    """Return whether two values are not the same number or the same tensor."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is not b
    return numbers_in(a) != numbers_in(b)
