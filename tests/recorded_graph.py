"""A stand-in for CUDA graphs on a CPU: a step's operations are recorded and run again without calling Python of ours.

As with a CUDA graph,

- recording takes no step: every tensor of before has its numbers again afterwards;
- Python runs once. Its numbers are those of the recording, in every replay;
- operations read and write the memory of the recording. A tensor that replaced another one is not seen;
- a replay writes numbers and nothing else: the versions by which torch counts writes to a tensor stay as they are;
- memory made while recording holds anything (here NaN) until a replay writes it, and what the last replay wrote then;
- what needs the host raises (host_reads.py): reads, shapes that depend on data, tensors made of its numbers. So do
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
from host_reads import NoHostFunctions, leaves, refuse_host_operation
from torch import Tensor
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
            with NoHostFunctions(), self:
                self.result = run(self.x)
        finally:
            for storage, numbers in before.values():
                storage.copy_(numbers)
        self.forget()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse_host_operation(func, args)
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


def alias(value: Any) -> Any:
    """Return tensors, and those in lists, as other tensors with the same memory, but versions of their own."""
    if isinstance(value, list | tuple):
        return [alias(item) for item in value]
    return value.data if isinstance(value, Tensor) else value
