"""Matryoshka: nested dictionaries, each of which reconstructs by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.ops import losses, sparse
from sae_lab.ops.sparse import Code
from sae_lab.runtime.errors import SettingError
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.batch_topk import BatchTopKSAE
from sae_lab.saes.linear import LinearSAE
from sae_lab.saes.topk import TopKSAE


@dataclass(frozen=True)
class NestedOutput(SAEOutput):
    """Output of a forward pass, with the reconstructions by growing parts of the code."""

    levels: tuple[Float[Tensor, "#b w d"], ...] = ()
    """Reconstructions by no latent (b_dec), by the first part, by the first two, ...; the last one is x_hat."""


class Nested(LinearSAE):
    """Nested dictionaries: every prefix of the groups of latents reconstructs by itself.

        x_hat^(g) = sum_{i in the first g groups} z_i W_dec_i + b_dec
        loss      = mean_g mean (x - x_hat^(g))² + aux

    The latents are split into G consecutive groups. z is selected once, among the latents of all groups, and the
    auxiliary loss uses the residual of the whole dictionary. General features end up in the small early groups, which
    must reconstruct without the later ones. `class Mine(Nested, AnySAE)` nests any linear SAE.

    Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv 2503.17547. Published implementations weight the levels in
    different ways. Here the loss is their mean, so that the auxiliary loss has the same weight relative to it as in
    every other SAE. To match a sum over the levels, use auxk_coefficient / G; to match an implementation that applies
    weights of 1/G twice, use auxk_coefficient · G. (Adam does not depend on the scale of the total loss.) The authors'
    code also counts b_dec alone as a level. `include_bias_level` does so; it is off by default, because no latent can
    lower that term.

    Args:
        group_sizes: number of latents that each group adds (not cumulative); they sum to n_latents. None: f/16, f/16,
            f/8, f/4, f/2, without prefixes narrower than d (see `doubling_group_sizes`).
        include_bias_level: whether b_dec alone counts as one more level.
        active_groups: in `eval()`, use only this many groups: after selection, the latents of later groups are set to
            zero. None: all groups.

    Raises:
        UserError: the sizes are not positive or do not sum to n_latents, or there are fewer groups than active_groups.
    """

    def __init__(
        self,
        *,
        group_sizes: Sequence[Annotated[int, Ge(1)]] | None = None,
        include_bias_level: bool = False,
        active_groups: Annotated[int, Ge(1)] | None = None,
        **base: Any,
    ):
        super().__init__(**base)
        self.group_sizes, self.include_bias_level, self.active_groups = group_sizes, include_bias_level, active_groups
        self.sizes = doubling_group_sizes(self.n_latents, self.d_in) if group_sizes is None else [*group_sizes]
        if sum(self.sizes) != self.n_latents:
            raise SettingError(
                f"{{group_sizes}}={group_sizes} must sum to the dictionary's {self.n_latents} latents: "
                "each is what its group adds."
            )
        if active_groups is not None and active_groups > len(self.sizes):
            raise SettingError(
                f"{{active_groups}}={active_groups} must lie between 1 and the {len(self.sizes)} groups."
            )

    @property
    def own_sizes(self) -> list[int]:
        """Numbers of latents of each group that this process holds."""
        ends = [min(max(end, self.own_latents.start), self.own_latents.stop) for end in accumulate(self.sizes)]
        return [end - start for start, end in pairwise([self.own_latents.start, *ends])]

    def encode_normalized(self, x: Float[Tensor, "b r d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        code, h = super().encode_normalized(x)
        if self.training or self.active_groups is None:
            return code, h
        return sparse.keep_first_latents(code, sum(self.own_sizes[: self.active_groups])), h

    def output(
        self, x: Float[Tensor, "b r d"], target: Float[Tensor, "b w d"], code: Code, h: Float[Tensor, "b f"] | None
    ) -> NestedOutput:
        groups = zip(sparse.split_by_group(code, self.own_sizes), self.W_dec.split(self.own_sizes), strict=True)
        nothing = torch.zeros_like(self.b_dec)
        levels = tuple(accumulate((sparse.decode(z, W, nothing) for z, W in groups), initial=self.decoder_offset(x)))
        return NestedOutput(x, target, levels[-1], code, h, levels)

    def latent_groups(self) -> tuple[str, list[int]]:
        return "group", self.sizes

    def row_parameters(self) -> dict[nn.Parameter, bool]:
        return {p: unit_norm for p, unit_norm in super().row_parameters().items() if p is not self.W_dec}  # split

    def reconstruction(self, out: SAEOutput) -> Tensor:
        assert isinstance(out, NestedOutput)
        levels = out.levels if self.include_bias_level else out.levels[1:]
        return losses.mean_of_levels(out.target, levels)


class MatryoshkaSAE(Nested, BatchTopKSAE):
    """Nested dictionaries (see Nested) with BatchTopK's rule, as in the paper."""

    shardable = True


class MatryoshkaTopKSAE(Nested, TopKSAE):
    """Nested dictionaries (see Nested) with TopK's rule: sae=matryoshka sae._target_=<this class>."""

    shardable = True


def doubling_group_sizes(n_latents: int, d_in: int) -> list[int]:
    """Return the sizes of groups that end at 1/16, 1/8, 1/4, 1/2 and all of the latents, rounded down.

    Groups that would end before d_in are merged into the next one; the authors' groups end at d, 2 d, 4 d, 8 d, 16 d. A
    prefix narrower than d cannot span the activations, so each of its latents must stand for several features. If
    features are equally frequent, training does learn such latents. Measured on rows of three out of 24 planted
    features (d = 16, f = 48): with ends 3, 6, 12, 24, 48 the loss is lower (0.0015) than that of the planted dictionary
    with the true codes (0.0017), and half of the features are found; with ends 24, 48 nearly all are found.
    """
    ends = [n_latents * sixteenths // 16 for sixteenths in (1, 2, 4, 8)]
    ends = [end for end in ends if d_in <= end < n_latents] + [n_latents]
    return [end - start for start, end in pairwise([0, *ends])]
