"""Codes by search in a dictionary, without an encoder (see ops/pursuit.py)."""

from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from sae_lab.api.activations import Array, as_tensor
from sae_lab.ops.pursuit import Dictionary, Method, pursue
from sae_lab.runtime.calls import check_call
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.pursuit_sae import require_dictionary

AnyDictionary = BaseSAE | Array
Steps = Annotated[int, Ge(1)]


@check_call
def gradient_pursuit(x: Array, dictionary: AnyDictionary, k: Steps, signed: bool = False) -> Float[Tensor, "*b f"]:
    """Return a dense code of at most k active latents per row, by k steps of gradient pursuit.

        code = gradient_pursuit(x, sae, k=32)
        x_hat = sae.decode(code, x)
        compute_metrics(x, code, x_hat)["fvu"]

    Args:
        x: raw activations (*b, d), or (*b, s, d).
        dictionary: an SAE, whose b_dec and normalization are taken into account; or rows (f, d), for x = code @ rows.
        k: number of steps.
        signed: whether latents may be negative.

    Raises:
        UserError: the SAE has no dictionary of its own, or is a transcoder.
    """
    return search("gradient_pursuit", x, dictionary, k, signed)


@check_call
def matching_pursuit(x: Array, dictionary: AnyDictionary, k: Steps, signed: bool = False) -> Float[Tensor, "*b f"]:
    """Return a dense code by matching pursuit. Arguments and errors are those of `gradient_pursuit`."""
    return search("matching_pursuit", x, dictionary, k, signed)


@check_call
def orthogonal_matching_pursuit(
    x: Array, dictionary: AnyDictionary, k: Steps, signed: bool = False
) -> Float[Tensor, "*b f"]:
    """Return a dense code by orthogonal matching pursuit. Arguments and errors are those of `gradient_pursuit`."""
    return search("orthogonal_matching_pursuit", x, dictionary, k, signed)


@torch.no_grad()
def search(method: Method, x: Array, dictionary: AnyDictionary, k: int, signed: bool) -> Float[Tensor, "*b f"]:
    """Return a dense code by `method`, in the units of the dictionary's rows."""
    x = as_tensor(x)
    if not isinstance(dictionary, BaseSAE):
        dictionary = as_tensor(dictionary)
        rows, axes = dictionary.flatten(1), x.shape[:-1] if dictionary.ndim == 2 else x.shape[: 1 - dictionary.ndim]
        if x.shape[len(axes) :].numel() != rows.shape[1]:
            raise UserError(
                f"x has shape {tuple(x.shape)} and the dictionary {tuple(dictionary.shape)}: x must end in its width."
            )
        y = x.reshape(axes.numel(), -1)
    else:
        sae = require_dictionary(dictionary)
        if sae.n_inputs:
            raise UserError("a transcoder predicts other rows than it reads, so no code can be searched for.")
        rows, axes = sae.W_dec.flatten(1), sae.leading(x)
        y = (sae.read(x)[0] - sae.b_dec).flatten(1)
    if not 1 <= k <= len(rows):
        raise UserError(f"k={k} must be a whole number from 1 to the dictionary's {len(rows)} rows.")
    return pursue(method, y.to(rows), Dictionary(rows), k, signed).to_dense().view(*axes, len(rows))
