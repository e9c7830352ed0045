"""The training step and the calibration, for loops of one's own."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from sae_lab.saes.base import BaseSAE
from sae_lab.training.step import StepResult, TrainingStep


def training_step(
    sae: BaseSAE, optimizer: torch.optim.Optimizer, x: Tensor, max_grad_norm: float | None = None
) -> StepResult:
    """Take one training step on raw activations (b, d) or (b, s, d): the step of the command.

        resample -> forward -> backward -> project gradients -> clip -> optimizer step -> project parameters

    Sets the SAE to train mode. Returns `loss`, `terms` (the named terms of the loss) and `out`. A GPU launches such
    steps kernel by kernel; `prepare_step` (training/capture.py) makes them CUDA graphs.

    Args:
        optimizer: an optimizer of `sae.parameters()`.
        max_grad_norm: clip the gradient to this norm; None does not clip.
    """
    rows = x.unsqueeze(1) if x.ndim == 2 else x
    return TrainingStep(sae.train(), optimizer, max_grad_norm)(rows)


def calibrate(sae: BaseSAE, batches: Iterable[Tensor], n: int = 100) -> BaseSAE:
    """Estimate what the SAE needs when it is deployed, such as BatchTopK's threshold, and set it to eval mode.

    Call it once, after the last step.

    Args:
        batches: batches of training size, from the training data.
        n: take at most so many.
    """
    with torch.no_grad():
        for i, x in enumerate(islice(batches, n)):
            sae.calibrate(sae.as_rows(x), i)
    return sae.eval()
