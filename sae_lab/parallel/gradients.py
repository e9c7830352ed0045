"""The average of gradients over ranks, computed while the backward pass goes on."""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from sae_lab.parallel.mesh import rank_axis


@contextmanager
def averaged_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Replace every gradient by its mean over ranks, after a backward pass inside the block.

    The exchange of a gradient begins when it is final, and goes on beside the rest of the backward pass. All ranks
    begin in the order of `parameters`, in which the decoder, whose gradient is final first, comes before the encoder.
    All ranks must have gradients for the same parameters.
    """
    axis = rank_axis()
    if axis.size == 1:
        yield
        return
    left, final, begun = deque(parameters), set[nn.Parameter](), []

    def begin() -> None:
        gradient = left.popleft().grad
        if gradient is not None:
            begun.append((gradient, dist.all_reduce(gradient, group=axis.group, async_op=True)))

    def begin_final(parameter: nn.Parameter) -> None:
        final.add(parameter)
        while left and left[0] in final:
            begin()

    hooks = [p.register_post_accumulate_grad_hook(begin_final) for p in left if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    while left:
        begin()
    for gradient, work in begun:
        work.wait()
        gradient /= axis.size
