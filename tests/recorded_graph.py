"""A stand-in for CUDA graphs on a CPU: a step's operations are recorded and run again without calling Python of ours.

As with a CUDA graph,

- recording takes no step: every tensor of before has its numbers again afterwards;
- Python runs once. Its numbers are those of the recording, in every replay;
- operations read and write the memory of the recording. A tensor that replaced another one is not seen;
- memory made while recording holds anything (here NaN) until a replay writes it, and what the last replay wrote then;
- what needs the host raises: reads of numbers, shapes that depend on data, tensors made of the host's numbers. So do
  random numbers, which a step of ours has none of.

Not as with a CUDA graph: memory of one graph is not used for another one, and tensors of the CPU that belong on the GPU
are not noticed (test_fixed_size.py looks for those). Triton kernels are not among a CPU's operations. The torch forms,
which test_sparse_triton.py compares with them, stand in for them.

torch.fx's make_fx records operations as well, but gives every replay new memory, so that what reads the numbers of
another replay goes unnoticed, and leaves what was written while tracing.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lab.training.step import StepResult


class Recorded(TorchDispatchMode):
    """A step that is recorded operation by operation, of the backward pass too. Stands in for CudaGraph.

    Args:
        run: takes the step on a batch.
        x: a batch of the shape and type of all batches to come.
    """

    def __init__(self, run: Callable[[Tensor], StepResult], x: Tensor):
        super().__init__()
        self.x = x.clone()
        self.operations: list[tuple[Any, tuple, dict, list[Tensor | None]]] = []
        self.own: dict[int, torch.UntypedStorage] = {}
        before = self.before = {}
        try:
            with WithoutHost(), self:
                self.result = run(self.x)
        finally:
            for storage, numbers in before.values():
                storage.copy_(numbers)
        self.forget()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reason := why_not_recorded(func, args):
            raise RuntimeError(f"{func} {reason}, which is not permitted when a step is recorded")
        written = [s for tensor in written_tensors(func, args, kwargs) for s in storages(tensor)]
        self.before |= {id_of(s): (s, s.clone()) for s in written if not self.knows(s)}
        # Aliases, since operations such as squeeze_ change the shape of a tensor that others were recorded with.
        aliases = [alias(value) for value in args], {name: alias(value) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        read = {id_of(s) for s in storages([*args, *kwargs.values()])}
        new = [None if read & {*map(id_of, storages(out))} else alias(out) for out in leaves(result)]
        self.own |= {id_of(s): s for s in storages(new)}
        if written or storages(new):  # a view needs nothing
            self.operations.append((func, *aliases, new))
        return result

    def knows(self, storage: torch.UntypedStorage) -> bool:
        return id_of(storage) in self.before or id_of(storage) in self.own

    def forget(self) -> None:
        """Overwrite all numbers made by the graph with NaN, or -1."""
        for storage in self.own.values():
            storage.fill_(0xFF)

    @torch.no_grad()
    def replay(self, x: Tensor) -> StepResult:
        self.forget()
        self.x.copy_(x)
        with torch.autocast(x.device.type, enabled=False):  # casts are among the operations
            for func, args, kwargs, new in self.operations:
                for mine, out in zip(new, leaves(func(*args, **kwargs)), strict=True):
                    if mine is not None:
                        mine.copy_(out)
        return self.result.detach()


class WithoutHost(TorchFunctionMode):
    """Raises where the host reads a tensor by other ways than operations."""

    READS = (Tensor.numpy, Tensor.tolist, Tensor.cpu, Tensor.__array__)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.READS:
            raise RuntimeError(f"{func.__name__} reads numbers, which is not permitted when a step is recorded")
        return func(*args, **(kwargs or {}))


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


def written_tensors(func: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """Yield the arguments that an operation writes, by its schema."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in leaves(given) if isinstance(leaf, Tensor))


def storages(tensors: Any) -> list[torch.UntypedStorage]:
    """Return the memory of tensors and of those in lists."""
    return [leaf.untyped_storage() for leaf in leaves(tensors) if isinstance(leaf, Tensor)]


def id_of(storage: torch.UntypedStorage) -> int:
    """Return what is the same for two objects of Python that stand for the same memory."""
    return storage._cdata


def leaves(value: Any) -> list:
    """Return the items of lists in lists; of anything else, itself."""
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]


def alias(value: Any) -> Any:
    """Return tensors, and those in lists, as other tensors with the same memory."""
    if isinstance(value, list | tuple):
        return [alias(item) for item in value]
    return value.detach() if isinstance(value, Tensor) else value
