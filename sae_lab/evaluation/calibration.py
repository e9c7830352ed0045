"""Calibration after training: estimate what inference needs, such as BatchTopK's threshold, with frozen weights."""

from collections.abc import Sequence

from sae_lab.activations.columns import Columns
from sae_lab.activations.stream import StreamData
from sae_lab.saes.base import BaseSAE


def calibrate(
    saes: Sequence[BaseSAE], data: StreamData, n_batches: int, sites: Sequence[Sequence[str]] | None = None
) -> None:
    """Call `calibrate` of every SAE on the first `n_batches` training batches.

    Args:
        sites: the sites of each SAE, among those of the data; None: all.
    """
    columns = [Columns(data.sites, own) for own in sites or [data.sites] * len(saes)]
    for i, x in enumerate(data.calibration_batches(n_batches)):
        for sae, own in zip(saes, columns, strict=True):
            sae.calibrate(own(x).to(next(sae.parameters()).device), i)
