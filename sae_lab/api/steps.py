"""The training step and the calibration, for loops of one's own."""

from collections.abc import Iterable
from itertools import islice
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from sae_lab.api.activations import Array, as_tensor
from sae_lab.runtime.calls import check_call
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.training.micro_batches import MicroBatchStep
from sae_lab.training.step import StepResult, TrainingStep


@check_call
def training_step(
    sae: BaseSAE,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    max_grad_norm: Annotated[float, Gt(0)] | None = None,
    micro_batches: Annotated[int, Ge(1)] = 1,
) -> StepResult:
    """Take one training step on raw activations (b, d) or (b, s, d): the step of the command.

        resample -> forward -> backward -> project gradients -> clip -> optimizer step -> project parameters

    Sets the SAE to train mode. Returns `loss`, `terms` (the named terms of the loss) and `out`. A GPU launches such
    steps kernel by kernel; `prepare_step` (training/capture.py) makes them CUDA graphs.

    Args:
        optimizer: an optimizer of `sae.parameters()`.
        max_grad_norm: clip the gradient to this norm; None does not clip.
        micro_batches: take the batch in so many parts, in the memory of one: the same step up to rounding. The result
            then has no `out`.
    """
    rows = x.unsqueeze(1) if x.ndim == 2 else x
    step = TrainingStep(sae.train(), optimizer, max_grad_norm)
    return (step if micro_batches == 1 else MicroBatchStep(step, micro_batches))(rows)


@check_call
def calibrate(sae: BaseSAE, batches: Array | Iterable[Array], n: Annotated[int, Ge(1)] = 100) -> BaseSAE:
    """Estimate what the SAE needs when it is deployed, such as BatchTopK's threshold, and set it to eval mode.

    Call it once, after the last step.

    Args:
        batches: batches of training size, from the training data, such as x.split(1024). A tensor is one batch.
        n: take at most so many.

    Raises:
        UserError: there is no batch, or one has no row.
    """
    given = [batches] if isinstance(batches, Array) else islice(batches, n)
    i = -1
    with torch.no_grad():
        for i, x in enumerate(given):
            rows = sae.as_rows(as_tensor(x))
            if not len(rows):
                raise UserError(f"batch {i} has no rows: calibrate needs batches of training size.")
            sae.calibrate(rows, i)
    if i < 0:
        raise UserError("batches is empty: calibrate needs at least one batch of training size.")
    return sae.eval()
