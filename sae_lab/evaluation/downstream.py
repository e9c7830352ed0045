"""Replace activations by x_hat inside the language model, to measure what the SAE's error costs downstream."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.lm.base import LanguageModel
from sae_lab.lm.predictions import Predictions

Replace = Callable[[Float[Tensor, "b s d"]], Float[Tensor, "b s d"]]


def spliced_predictions(
    lm: LanguageModel,
    tokens: Int[Tensor, "n t"],
    activations: Float[Tensor, "n t s d"],
    keep: Bool[Tensor, "n t"],
    replace: Replace,
    predicted: Bool[Tensor, "#b s"] | None = None,
) -> Predictions:
    """Return the model's predictions after replacing activations.

    Positions and sources that are not replaced keep the activation of this forward pass. At a later site it may differ
    from the clean activation, because of the replacements at earlier sites.

    Args:
        activations: the clean activations.
        keep: the b positions at which to replace.
        replace: maps the b rows `activations[keep]` to their replacements.
        predicted: the sources of each row to replace; None replaces all.
    """
    keep = keep.to(activations.device)
    return predictions_with(lm, tokens, keep, replace(activations[keep]).to(activations), predicted)


def predictions_with(
    lm: LanguageModel,
    tokens: Int[Tensor, "n t"],
    keep: Bool[Tensor, "n t"],
    rows: Float[Tensor, "b s d"],
    predicted: Bool[Tensor, "#b s"] | None = None,
) -> Predictions:
    """Return the model's predictions with the activations at the b positions of `keep` replaced by `rows`.

    Differentiable with respect to `rows`; the other arguments are those of `spliced_predictions`.
    """
    keep = keep.to(rows.device)
    spliced, where = rows.new_zeros(*keep.shape, *rows.shape[1:]), keep.unsqueeze(-1).repeat(1, 1, rows.shape[1])
    spliced[keep] = rows
    if predicted is not None:
        where[keep] = predicted.to(where.device)
    return lm.predictions(tokens, spliced, where)


def zero_ablation(x: Tensor) -> Tensor:
    """Replace activations by zero."""
    return torch.zeros_like(x)


def constant_ablation(value: Float[Tensor, "s d"]) -> Replace:
    """Return a function that replaces activations by `value`, such as the mean activation."""
    return lambda x: value.to(x).expand_as(x)
