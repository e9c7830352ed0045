"""Generate text with a frozen language model, token by token, whatever its back end."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.lm.predictions import Predictions

Predict: TypeAlias = Callable[[Int[Tensor, "n t"]], Predictions]
"""A forward pass: `lm.predictions` itself, or one that changes activations on the way."""
LAST = slice(-1, None)


@torch.no_grad()
def generate(
    predict: Predict,
    prompt: Int[Tensor, "n t"],
    n_new: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    context: int | None = None,
) -> Int[Tensor, "n t+n_new"]:
    """Continue each row of token ids by n_new tokens.

    Each new token takes a pass over the whole row. There is no cache of keys and values, which not every back end has,
    and a changed activation may depend on the whole row.

    Args:
        predict: a forward pass, such as `lm.predictions`.
        prompt: token ids on the CPU, BOS included.
        n_new: number of tokens to add.
        temperature: the logits are divided by it before a token is drawn; 0 takes the most likely token.
        seed: seed of the draws.
        context: the pass sees only so many last tokens of a row; None: all.
    """
    generator, tokens = torch.Generator().manual_seed(seed), prompt
    for _ in range(n_new):
        seen = tokens if context is None else tokens[:, -context:]
        logits = predict(seen).logits(positions=LAST)[:, -1].float().cpu()
        tokens = torch.cat([tokens, choose(logits, temperature, generator)], dim=1)
    return tokens


def choose(logits: Float[Tensor, "n v"], temperature: float, generator: torch.Generator) -> Int[Tensor, "n 1"]:
    """Return the most likely token of each row, or with a temperature one drawn at random."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
