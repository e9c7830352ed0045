"""x_hat spliced back into the language model: what the SAE's error costs downstream."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.lm.base import LanguageModel

Replace = Callable[[Float[Tensor, "b s d"]], Float[Tensor, "b s d"]]


def spliced_logits(
    lm: LanguageModel,
    tokens: Int[Tensor, "n t"],
    activations: Float[Tensor, "n t s d"],
    keep: Bool[Tensor, "n t"],
    replace: Replace,
    covers: Bool[Tensor, "#b s"] | None = None,
) -> Float[Tensor, "n t v"]:
    """The model's logits where the activations at the kept positions are replaced.

    `activations[keep]` are the b rows to replace, at the sources where `covers` is True (None: all of them). All else
    is what the forward pass makes of what was replaced before it: at a later site, not the clean activation.
    """
    keep = keep.to(activations.device)
    spliced, where = activations.clone(), keep.unsqueeze(-1).repeat(1, 1, activations.shape[2])
    spliced[keep] = replace(activations[keep]).to(spliced)
    if covers is not None:
        where[keep] = covers.to(where.device)
    return lm.logits(tokens, spliced, where)


def zero_ablation(x: Tensor) -> Tensor:
    """Zero-ablation."""
    return torch.zeros_like(x)


def constant_ablation(value: Float[Tensor, "s d"]) -> Replace:
    """Ablation to a constant, such as the mean activation."""
    return lambda x: value.to(x).expand_as(x)
