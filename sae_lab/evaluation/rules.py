"""The activation rule of one SAE on the parameters of another: the write-up's cross-check."""

from typing import Any

from sae_lab.activations.data import ActivationData
from sae_lab.evaluation.calibration import calibrate
from sae_lab.evaluation.evaluator import evaluate
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.batch_topk import BatchTopKSAE
from sae_lab.saes.topk import TopKSAE

ACTIVATIONS: dict[str, tuple[type[BaseSAE], dict[str, Any]]] = {
    "topk": (TopKSAE, {}),
    "batch_topk": (BatchTopKSAE, {"quantile": "batch"}),
    "threshold": (BatchTopKSAE, {"quantile": "batch"}),
}
"""Who has a rule: batch_topk is what a BatchTopKSAE does in `train()`, threshold what it does in `eval()`."""


def with_activation(sae: BaseSAE, activation: str) -> BaseSAE:
    """The parameters of `sae` under another rule; a threshold is to be calibrated.

    Raises:
        UserError: an unknown rule, or one that cannot work with the parameters or the k of this SAE.
    """
    if activation not in ACTIVATIONS:
        raise UserError(f"activation={activation} is not known: choose one of {', '.join(ACTIVATIONS)}.")
    cls, settings = ACTIVATIONS[activation]
    if sae.config.get("k") is None:
        raise UserError(f"activation={activation} needs a k, and a {type(sae).__name__} has none.")
    other = sae.convert_to(cls, **settings)
    lacking = dict(other.named_parameters()).keys() - dict(sae.named_parameters(remove_duplicate=False)).keys()
    if lacking:
        raise UserError(f"activation={activation} needs {', '.join(lacking)}, and a {type(sae).__name__} has none.")
    return other


def evaluate_under(activation: str, sae: BaseSAE, data: ActivationData, calibration_batches: int) -> dict[str, Any]:
    """The metrics of the parameters of `sae` under the rule that `activation` names."""
    other = with_activation(sae, activation)
    if other.batch_rule:
        calibrate([other], data, calibration_batches)
    metrics = evaluate(other, data).metrics
    batch_wise = metrics.pop("train_mode")
    return (batch_wise if activation == "batch_topk" else metrics) | {"activation": activation}
