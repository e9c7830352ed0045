"""Another encoder for the dictionary of an SAE."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from annotated_types import Ge

from sae_lab.runtime.calls import check_call
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.pursuit_sae import require_dictionary


@check_call
def with_encoder(
    sae: BaseSAE,
    hidden: Sequence[Annotated[int, Ge(1)]] = (),
    from_scratch: bool = False,
    frozen_decoder: bool = True,
    **changes: Any,
) -> BaseSAE:
    """Return an SAE with the dictionary of this one and another encoder, to be trained.

        mlp = with_encoder(sae, hidden=[1024])                       # the encoder of sae, plus an MLP that starts at 0
        new = with_encoder(sae, hidden=[1024, 1024], from_scratch=True)
        train_sae(new, activations, n_tokens=10_000_000)

    It shares no memory with `sae`.

    Args:
        hidden: widths of the hidden layers of an MLP that is added to the linear encoder; empty: none.
        from_scratch: draw the encoder anew; otherwise it starts as that of `sae`.
        frozen_decoder: whether W_dec and b_dec stay as they are.
        changes: other settings, such as k or seed.

    Raises:
        UserError: the class of `sae` has no encoder, or a setting does not fit.
    """
    source = require_dictionary(sae)
    if "hidden" not in type(sae).arguments():
        raise UserError(f"a {type(sae).__name__} has no encoder: convert it first, sae.convert_to(TopKSAE, k=...).")
    settings = {"hidden": [*hidden], "frozen_decoder": frozen_decoder, **changes}
    if not from_scratch:
        new = sae.convert_to(type(sae), **settings)
        new.restart()
        return new.train()
    new = require_dictionary(type(sae).from_config(sae.config | settings).to(source.W_dec.device))
    with torch.no_grad():
        new.W_dec.copy_(source.W_dec)
        new.b_dec.copy_(source.b_dec)
        new.sources.load_state_dict(source.sources.state_dict())
    return new.train()
