"""An SAE around another one, whose latents it has."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from typing_extensions import Self

from sae_lab.runtime.errors import settings_under
from sae_lab.saes.base import BaseSAE


class ComposedSAE(BaseSAE):
    """Base class of SAEs that give rows to an inner SAE, `inner`, and have its latents.

    A subclass decides which rows these are, and what becomes of their x_hat. What concerns latents is passed on to the
    inner SAE here.
    """

    inner: BaseSAE

    def build_inner(self, inner: Callable[..., BaseSAE] | Mapping[str, Any]) -> None:
        """Build the inner SAE by a function of d_in, n_latents and n_sources=1, or from its description."""
        if isinstance(inner, Mapping):
            self.inner = BaseSAE.by_name(inner["class"], inner["config"])
        else:
            with settings_under("inner"):
                self.inner = inner(d_in=self.d_in, n_latents=self.n_latents, n_sources=1)
        self.batch_rule, self.varying_size = self.inner.batch_rule, self.inner.varying_size
        self.signed, self.sparse_codes = self.inner.signed, self.inner.sparse_codes

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"inner": {"class": type(self.inner).__name__, "config": self.inner.config}}

    @torch.no_grad()
    def start_from(self, other: BaseSAE) -> None:
        super().start_from(other)
        if isinstance(other, ComposedSAE):
            self.inner.start_from(other.inner)  # it may know what need not start at the first batch now

    @property
    def own_latents(self) -> range:
        return self.inner.own_latents

    def latent_axes(self) -> dict[str, int]:
        return {f"inner.{name}": axis for name, axis in self.inner.latent_axes().items()}

    def restart(self) -> None:
        self.inner.restart()

    def with_k(self, k: float) -> Self:
        inner = self.inner.with_k(k)
        return self.convert_to(type(self), inner={"class": type(inner).__name__, "config": inner.config})

    def activation_thresholds(self) -> Float[Tensor, " f"] | None:
        return self.inner.activation_thresholds()

    def latent_groups(self) -> tuple[str, list[int]] | None:
        return self.inner.latent_groups()

    def foresee(self, ahead: int) -> dict[str, Tensor]:
        return self.inner.foresee(ahead)

    def plan_step(self, foreseen: Mapping[str, int]) -> Hashable:
        return self.inner.plan_step(foreseen)

    def row_parameters(self) -> dict[nn.Parameter, bool]:
        return self.inner.row_parameters()

    def before_step(self) -> None:
        self.inner.before_step()

    def after_step(self) -> None:
        self.inner.after_step()

    def dead(self) -> Bool[Tensor, " f"] | None:
        return self.inner.dead()
