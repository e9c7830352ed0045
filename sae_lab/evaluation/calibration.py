"""After training: what an SAE's inference needs, such as BatchTopK's threshold, estimated with the weights frozen."""

from collections.abc import Sequence

from sae_lab.activations.data import ActivationData
from sae_lab.saes.base import BaseSAE


def calibrate(saes: Sequence[BaseSAE], data: ActivationData, n_batches: int) -> None:
    """Let every SAE estimate what its inference needs (BatchTopK's threshold), on the first training batches."""
    for i, x in enumerate(data.calibration_batches(n_batches)):
        for sae in saes:
            sae.calibrate(x.to(next(sae.parameters()).device), i)
