"""Evaluate the parameters of one SAE under the activation rule of another: the BatchTopK write-up's cross-check."""

from typing import Any

from sae_lab.activations.stream import StreamData
from sae_lab.evaluation.calibration import calibrate
from sae_lab.evaluation.evaluator import evaluate, evaluate_all
from sae_lab.ops.pursuit import METHODS
from sae_lab.runtime.errors import UserError, settings_under
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.batch_topk import BatchTopKSAE
from sae_lab.saes.pursuit_sae import PursuitSAE
from sae_lab.saes.topk import TopKSAE

ACTIVATIONS: dict[str, tuple[type[BaseSAE], dict[str, Any]]] = {
    "topk": (TopKSAE, {}),
    "batch_topk": (BatchTopKSAE, {"quantile": "batch"}),
    "threshold": (BatchTopKSAE, {"quantile": "batch"}),
}
"""Class and settings of each rule: batch_topk is BatchTopKSAE in `train()` mode, threshold in `eval()` mode."""


def convert_activation(sae: BaseSAE, activation: str) -> BaseSAE:
    """Return an SAE with the parameters of `sae` and another activation rule. Its threshold is not calibrated yet.

    Raises:
        UserError: the rule is unknown, or this SAE lacks the parameters or the k that it needs.
    """
    if activation not in ACTIVATIONS:
        raise UserError(f"activation={activation} is not known: choose one of {', '.join(ACTIVATIONS)}.")
    cls, settings = ACTIVATIONS[activation]
    if sae.config.get("k") is None:
        raise UserError(f"activation={activation} needs a k, and a {type(sae).__name__} has none.")
    other = sae.convert_to(cls, **settings)
    missing = dict(other.named_parameters()).keys() - dict(sae.named_parameters(remove_duplicate=False)).keys()
    if missing:
        raise UserError(f"activation={activation} needs {', '.join(missing)}, and a {type(sae).__name__} has none.")
    return other


def set_k(sae: BaseSAE, k: float, data: StreamData, calibration_batches: int) -> BaseSAE:
    """Return the SAE with another k, and its threshold, if it has one, calibrated for it.

    Raises:
        UserError: the SAE cannot take this k after training.
    """
    other = sae.with_k(k)
    if other.batch_rule:
        calibrate([other], data, calibration_batches)
    return other


def evaluate_under(activation: str, sae: BaseSAE, data: StreamData, calibration_batches: int) -> dict[str, Any]:
    """Evaluate the parameters of `sae` under the rule `activation`."""
    other = convert_activation(sae, activation)
    if other.batch_rule:
        calibrate([other], data, calibration_batches)
    metrics = evaluate(other, data).metrics
    batch_wise = metrics.pop("train_mode")
    return (batch_wise if activation == "batch_topk" else metrics) | {"activation": activation}


def compare_encoders(sae: BaseSAE, encoder: str, k: int | None, data: StreamData) -> dict[str, dict[str, Any]]:
    """Evaluate the SAE with its own encoder, and its dictionary with a pursuit in place of the encoder.

    Args:
        encoder: a key of pursuit.METHODS.
        k: of the pursuit; None is the SAE's own.

    Returns:
        The metrics under `own` and under the name of the pursuit, each with rows_per_second.
    """
    if encoder not in METHODS:
        raise UserError(f"encoder={encoder} is not known: choose own or one of {', '.join(METHODS)}.")
    with settings_under("pursuit"):
        pursuit = PursuitSAE.of(sae, encoder, k)
    evaluations = evaluate_all({"own": sae, encoder: pursuit}, data)
    metrics = {name: {"rows_per_second": e.rows_per_second} | e.metrics for name, e in evaluations.items()}
    metrics[encoder]["k"] = pursuit.k
    return metrics
