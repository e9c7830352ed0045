"""Metrics of an SAE on activations, on text, or of codes of any origin."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from sae_lab.activations.finite import check_finite
from sae_lab.activations.stream import StreamData
from sae_lab.api.activations import Activations, Array, as_tensor
from sae_lab.evaluation.evaluator import evaluate
from sae_lab.evaluation.metrics import ReconstructionMetrics
from sae_lab.lm.base import LanguageModel
from sae_lab.ops.sparse import Code, SparseCode
from sae_lab.runs.loading import check_width
from sae_lab.runtime.calls import check_call
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

ALL = 2**40
"""More tokens than any list of documents has."""


@check_call
def evaluate_sae(
    sae: BaseSAE,
    on: Array | LanguageModel | Activations | StreamData,
    documents: Iterable[str] | str | Path | None = None,
    batch_size: Annotated[int, Ge(1)] = 1024,
    **settings: Any,
) -> dict[str, Any]:
    """Return the metrics of an SAE by name, under the rule that it is deployed with.

        evaluate_sae(sae, x)["fvu"]                               # every row of a tensor
        evaluate_sae(sae, lm, documents)["loss_recovered"]        # every token of a list of strings
        evaluate_sae(sae, Activations.from_lm(lm, "stdlib"))      # what these hold out from training

    docs/evaluation.md defines the metrics. With text there are those of the language model's cross-entropy, and
    `train_mode`, the same metrics under the training rule.

    Args:
        on: activations, or a language model.
        documents: for a language model: strings, or what `Activations.from_lm` takes.
        batch_size: rows of a tensor that are encoded together; changes no number beyond rounding.
        settings: for documents: settings of conf/data, such as n_eval_tokens or seq_len.

    Raises:
        UserError: the SAE does not fit, a language model has no documents, activations have documents or settings, or
            there are none or one is not finite.
    """
    if not isinstance(on, LanguageModel) and (documents is not None or settings):
        wrong = next(iter(settings), "documents")
        raise UserError(
            f"{wrong} has no effect here: documents and settings of their reading go with a language model, "
            f"evaluate_sae(sae, lm, documents, ...); Activations take their settings themselves."
        )
    if isinstance(on, Array):
        return evaluate_rows(sae, as_tensor(on), batch_size)
    if isinstance(on, LanguageModel):
        if documents is None:
            raise UserError("a language model needs text: give evaluate_sae(sae, lm, documents).")
        return evaluate_text(sae, on, documents, settings)
    data = on.data() if isinstance(on, Activations) else on
    return evaluate_on(sae, data)


def evaluate_text(
    sae: BaseSAE, lm: LanguageModel, documents: Iterable[str] | str | Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate on all tokens of strings, or on the held-out ones of other documents."""
    if isinstance(documents, str | Path):
        return evaluate_on(sae, Activations.from_lm(lm, documents, **settings).data())
    whole = {"held_out_every": 1, "order": "as_read", **settings}
    data = Activations.from_lm(lm, documents, **whole).data()
    if "n_eval_tokens" not in settings:
        data.n_eval_tokens = data.held_out(ALL).n_tokens
    return evaluate_on(sae, data)


def evaluate_on(sae: BaseSAE, data: StreamData) -> dict[str, Any]:
    check_width(sae, data)
    return evaluate(sae.to(data.device), data).metrics


@torch.no_grad()
def evaluate_rows(sae: BaseSAE, x: Tensor, batch_size: int) -> dict[str, Any]:
    """Evaluate on every row of a tensor."""
    before, device = sae.training, next(sae.parameters()).device
    totals = ReconstructionMetrics(sae.n_latents).to(device)
    axes = sae.leading(x)
    rows = usable(x.reshape(axes.numel(), *x.shape[len(axes) :]))
    sae.eval()
    try:
        for part in rows.split(batch_size):
            batch = sae.as_rows(part.to(device))
            totals.update(batch, *sae.autoencode(batch), sae.predicted_mask(batch))
    finally:
        sae.train(before)
    left_out = totals.undefined()
    return totals.compute() | ({"left_out": left_out} if left_out else {})


def usable(rows: Tensor, name: str = "x") -> Tensor:
    """Return rows unchanged; raise a UserError if there are none, or one is not finite."""
    if not rows.numel():
        raise UserError(f"{name} has shape {tuple(rows.shape)}: give at least one row.")
    check_finite(
        rows.reshape(-1, 1, rows.shape[-1]), [name], f"leave such rows out, {name}[{name}.isfinite().all(-1)]."
    )
    return rows


@check_call
def compute_metrics(x: Array, code: Array | SparseCode, x_hat: Array) -> dict[str, float]:
    """Return fvu, nmse, l0, cosine similarity and the other reconstruction metrics of a code of any origin, by name.

    Args:
        x: raw activations, (*b, d) or (*b, s, d).
        code: their code, (*b, f) or sparse.
        x_hat: the reconstruction, in the shape of x.

    Raises:
        UserError: the shapes do not fit each other, there are no rows, or a number is not finite.
    """
    x, x_hat = as_tensor(x), as_tensor(x_hat)
    flat: Code = code if isinstance(code, SparseCode) else as_tensor(code).flatten(0, -2)
    n = flat.shape[0]
    if x.ndim < 2 or n not in (x.shape[:-1].numel(), x.shape[:-2].numel()) or x_hat.numel() != x.numel():
        raise UserError(
            f"x has shape {tuple(x.shape)}, code {tuple(code.shape)} and x_hat {tuple(x_hat.shape)}: x and x_hat must "
            "have the same shape, (*b, d) or (*b, s, d), and code one row for each of b."
        )
    rows = usable(x).reshape(n, -1, x.shape[-1])
    totals = ReconstructionMetrics(flat.shape[1]).to(x.device)
    totals.update(rows, usable(x_hat, "x_hat").reshape(rows.shape), flat)
    return totals.compute()
