"""What a forward pass of an SAE returns."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.ops.sparse import Code, l0_per_row
from sae_lab.runtime.errors import UserError

PROPERTIES = ("loss", "losses", "l0", "x", "target", "x_hat", "code")
"""Names that `out[name]` has besides those of the loss terms."""


@dataclass(frozen=True)
class SAEOutput:
    """Output of a forward pass, in the SAE's own (normalized) units.

    `out.loss`, `out.losses` and `out.l0` are computed when they are first asked for, so ask before the next forward
    pass: the auxiliary loss reads the SAE's counters. `out["loss"]` is the same as `out.loss`, and `out["auxk"]` is a
    term of `out.losses`.
    """

    x: Float[Tensor, "b r d"]
    """The rows that were encoded: the normalized input, or for a RouteSAE the routed row (r = 1)."""
    target: Float[Tensor, "b w d"]
    """The rows that x_hat is compared with: x, or for a transcoder the sources that it predicts."""
    x_hat: Float[Tensor, "b w d"]
    code: Code
    h: Float[Tensor, "b f"] | None = None
    """Pre-activations, for losses that need them; None for sparse codes, where h is never held as a whole."""
    sae: Any = field(default=None, repr=False, compare=False, kw_only=True)
    """The SAE, which `sae(x)` fills in; None inside a training step."""

    @cached_property
    def losses(self) -> dict[str, Tensor]:
        """The named terms of the training loss, already weighted."""
        if self.sae is None:
            raise UserError("this output does not know its SAE: call sae(x), or sae.losses(out).")
        return self.sae.losses(self)

    @property
    def loss(self) -> Tensor:
        """The sum of `losses`, which training minimizes."""
        return torch.stack(list(self.losses.values())).sum()

    @property
    def l0(self) -> Tensor:
        """The mean number of active latents per row."""
        return l0_per_row(self.code).float().mean()

    def __getitem__(self, name: str) -> Any:
        if name in PROPERTIES:
            return getattr(self, name)
        if name in self.losses:
            return self.losses[name]
        raise KeyError(f"{name!r} is not in this output, expected one of {', '.join((*PROPERTIES, *self.losses))}")
