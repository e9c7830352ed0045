"""Calibration after training: estimate what inference needs, such as BatchTopK's threshold, with frozen weights."""

from collections.abc import Sequence

from sae_lab.activations.data import ActivationData
from sae_lab.saes.base import BaseSAE


def calibrate(saes: Sequence[BaseSAE], data: ActivationData, n_batches: int) -> None:
    """Call `calibrate` of every SAE on the first `n_batches` training batches."""
    for i, x in enumerate(data.calibration_batches(n_batches)):
        for sae in saes:
            sae.calibrate(x.to(next(sae.parameters()).device), i)
