"""Hooks that put x_hat of an SAE in the place of activations, in whatever passes a language model makes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.plain_text import plural

LM = Any
"""A LanguageModel, whose file imports this one."""


def splicing_hooks(lm: LM, sae: Any, edit: Any, keep_error: bool) -> dict[str, Callable[[Any], Tensor | None]]:
    """Return a hook for each site: those of sites that are only read remember them, the others replace.

    Raises:
        UserError: the SAE does not fit the sites, or needs activations of later sites.
    """
    if (len(lm.sites), lm.d) != (sae.n_sources, sae.d_in):
        raise UserError(
            f"the SAE takes {plural(sae.n_sources, 'site')} of width {sae.d_in}, and {lm.name} is read at "
            f"{len(lm.sites)} of width {lm.d}: load it at the sites of the SAE."
        )
    if sae.n_sources - sae.n_inputs > 1 and sae.n_sources > 1:
        raise UserError(
            f"a {type(sae).__name__} that predicts {sae.n_sources - sae.n_inputs} sites at once cannot be spliced "
            "while the model runs: use lm.logits(tokens, replace)."
        )
    seen: dict[str, Tensor] = {}
    read = lm.sites[: sae.n_inputs]
    hooks: dict[str, Any] = {site: partial(seen.__setitem__, site) for site in read}
    hooks[lm.sites[-1]] = partial(replaced, sae, read, seen, edit, keep_error)
    return hooks


@torch.no_grad()
def replaced(
    sae: Any, read: tuple[str, ...], seen: dict[str, Tensor], edit: Any, keep_error: bool, x: Tensor
) -> Tensor:
    """Return what takes the place of the activation x of the last site.

    Raises:
        UserError: a site that the SAE reads comes later in the model.
    """
    if missing := [site for site in read if site not in seen]:
        raise UserError(f"the model computes {missing[0]} after the site that the SAE predicts: reverse the sites.")
    inputs = [seen[site] for site in read] or [x]
    rows = torch.stack([y.flatten(2).flatten(0, 1) for y in inputs], dim=1)
    of_sae = next(sae.parameters())
    rows = rows.to(of_sae)
    predict = sae.predict if sae.n_inputs else sae.reconstruct
    new = predict(rows, edit)
    if keep_error:
        new = x.reshape(new.shape).to(new) + new - predict(rows)
    return new.reshape(x.shape).to(x)
