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
) -> Float[Tensor, "n t v"]:
    """The model's logits where the activations at the kept positions are replaced; the others stay as they are."""
    spliced = activations.clone()
    keep = keep.to(activations.device)
    spliced[keep] = replace(activations[keep]).to(spliced)
    return lm.logits(tokens, spliced)


def zero(x: Tensor) -> Tensor:
    """Zero-ablation."""
    return torch.zeros_like(x)


def constant(value: Float[Tensor, "s d"]) -> Replace:
    """Ablation to a constant, such as the mean activation."""
    return lambda x: value.to(x).expand_as(x)
