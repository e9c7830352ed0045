"""Replace activations by x_hat inside the language model, to measure what the SAE's error costs downstream."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.lm.base import LanguageModel
from sae_lab.lm.generation import Predict
from sae_lab.lm.predictions import Predictions
from sae_lab.saes.base import BaseSAE, Edit

Replace = Callable[[Float[Tensor, "b s d"]], Float[Tensor, "b s d"]]
Keep = Callable[[Int[Tensor, "n t"], Float[Tensor, "n t s d"]], Bool[Tensor, "n t"]]


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


def with_edit(
    lm: LanguageModel, sae: BaseSAE, edit: Edit | None, keep: Keep | None = None, keep_error: bool = True
) -> Predict:
    """Return the forward pass of a language model in which the code of an SAE is edited at every kept position.

    Args:
        edit: maps the dense code (b, f) to the one that is decoded; None leaves it as it is.
        keep: the positions at which to edit, such as `data.positions.mask_with`; None: all.
        keep_error: add what the edit changes of x_hat to the activation, which keeps the part that the SAE does not
            explain; False: x_hat itself takes the place of the activation.
    """

    def replace(x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        x = x.to(next(sae.parameters()))  # in the SAE's precision, so that a difference of two x_hat is exact enough
        return x + sae.reconstruct(x, edit) - sae.reconstruct(x) if keep_error else sae.reconstruct(x, edit)

    def predict(tokens: Int[Tensor, "n t"]) -> Predictions:
        activations = lm.activations(tokens)
        kept = torch.ones(tokens.shape, dtype=torch.bool) if keep is None else keep(tokens, activations)
        rows = activations[kept.to(activations.device)].to(next(sae.parameters()).device)
        return spliced_predictions(lm, tokens, activations, kept, replace, sae.predicted_mask(rows))

    return predict


def zero_ablation(x: Tensor) -> Tensor:
    """Replace activations by zero."""
    return torch.zeros_like(x)


def constant_ablation(value: Float[Tensor, "s d"]) -> Replace:
    """Return a function that replaces activations by `value`, such as the mean activation."""
    return lambda x: value.to(x).expand_as(x)
