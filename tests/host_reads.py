"""What the host may not do while a GPU computes: read a tensor, or send numbers to it.

On a CPU these work, and cost nothing. Two modes find them there: one in torch's operations, the other in functions and
methods that call no operation, or none that tells. Neither sees `torch.frombuffer` and pickle.
"""

import sys
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

READS = (
    *(Tensor.numpy, Tensor.tolist, Tensor.cpu, Tensor.cuda),
    *(Tensor.__array__, Tensor.__dlpack__, Tensor.__repr__, Tensor.__format__),
)
"""Methods that copy between host and GPU. `item`, float() and the like call an operation."""
REFUSED = "which is not permitted when a step is recorded"
GPU = torch.device("cpu", 0)
"""The device of all tensors, as `NoHostFunctions` tells it: the CPU, but not equal to torch.device("cpu")."""


class NoHostFunctions(TorchFunctionMode):
    """Raises a RuntimeError where a method reads a tensor, or a call names the CPU, as x.to("cpu") does.

    Tensors say that they are on `GPU`, so that x.to(y.device) passes. Calls from torch's own code pass too: its
    optimizers get the devices of tensors in C++, as torch.device("cpu").
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return GPU
        if func in READS or (func is Tensor.type and not kwargs and isinstance(args[-1], str | type)):
            raise RuntimeError(f"{func.__name__} copies between host and GPU, {REFUSED}")
        caller = sys._getframe(1).f_globals["__name__"]
        if not caller.startswith("torch.") and any(is_host(value) for value in [*args, *kwargs.values()]):
            raise RuntimeError(f"{func.__name__} goes to the host, {REFUSED}")
        return func(*map(on_cpu, args), **{name: on_cpu(value) for name, value in kwargs.items()})


class NoHostOperations(TorchDispatchMode):
    """Raises a RuntimeError where an operation needs the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        refuse_host_operation(func, args)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_allowed():
    """Allow inside the block what the modes refuse."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def is_host(value: Any) -> bool:
    """Return whether an argument of a call names the CPU."""
    return isinstance(value, str | torch.device) and str(value) == "cpu"


def on_cpu(value: Any) -> Any:
    """Return the device by which torch knows a tensor that it need not copy."""
    return torch.device("cpu") if isinstance(value, torch.device) and value == GPU else value


def refuse_host_operation(func: Any, args: tuple) -> None:
    """Raise a RuntimeError if an operation needs the host."""
    if reason := why_not_recorded(func, args):
        raise RuntimeError(f"{func} {reason}, {REFUSED}")


def why_not_recorded(func: Any, args: tuple) -> str | None:
    """Return why a CUDA graph could not contain an operation; None if it can."""
    if func is torch.ops.aten.lift_fresh.default:
        return "copies numbers of the host"
    if torch.Tag.nondeterministic_seeded in func.tags:
        return "draws random numbers"
    if torch.Tag.data_dependent_output in func.tags:
        return "reads a number"
    index = str(func).startswith("aten.index")  # has this tag for indices that are masks
    masks = [t for t in leaves(args[1:2]) if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
    filled = "put" in str(func) and args[2].numel() == 1  # torch then calls masked_fill
    if masks and not filled if index else torch.Tag.dynamic_output_shape in func.tags:
        return "has a shape that depends on data"
    return None


def leaves(value: Any) -> list:
    """Return the items of lists in lists; of anything else, itself."""
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]
