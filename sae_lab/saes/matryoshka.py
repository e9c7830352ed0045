"""Matryoshka: nested dictionaries, each of which reconstructs on its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from sae_lab.ops import losses, sparse
from sae_lab.ops.sparse import Code
from sae_lab.runtime.errors import SettingError
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.batch_topk import BatchTopKSAE
from sae_lab.saes.linear import LinearSAE
from sae_lab.saes.topk import TopKSAE


@dataclass(frozen=True)
class NestedOutput(SAEOutput):
    levels: tuple[Float[Tensor, "#b w d"], ...] = ()
    """The reconstruction by no latent (b_dec), by the first group, by the first two, ...; the last is x_hat."""


class Nested(LinearSAE):
    """x_hat^(g) = sum_{i in the first g groups} z_i W_dec_i + b_dec,   loss = mean_g mean (x - x_hat^(g))² + aux

    The latents are cut into G consecutive groups; z comes from one choice among all of them (`class Mine(Nested,
    AnySAE)` nests any linear SAE), and the auxiliary loss explains what the whole dictionary leaves over. General
    features settle in the small early groups, which have to do without the others.

    Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv 2503.17547. The published codes weigh the levels differently.
    Here it is their mean, so that loss and auxiliary loss stand to each other as in every other SAE. The authors'
    code also counts b_dec alone as a level: `include_bias_level`, off, because no latent can lower that term. A sum
    over the levels is auxk_coefficient / G here, weights of 1/G taken twice are auxk_coefficient · G: Adam does not
    see the scale of the whole.

    Args:
        group_sizes: how many latents each group adds (not cumulative); they sum to n_latents. None is f/16, f/16,
            f/8, f/4, f/2 without the prefixes narrower than d (see `doubling`).
        include_bias_level: whether b_dec alone counts as one more level.
        active_groups: in `eval()`, the latents of later groups are zero, after the choice; None uses all groups.

    Raises:
        UserError: sizes that are not positive or do not sum to n_latents, or more active groups than there are.
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

    def encode_normalized(self, x: Float[Tensor, "b r d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        code, h = super().encode_normalized(x)
        if self.training or self.active_groups is None:
            return code, h
        return sparse.keep_first_latents(code, sum(self.sizes[: self.active_groups])), h

    def output(
        self, x: Float[Tensor, "b r d"], target: Float[Tensor, "b w d"], code: Code, h: Float[Tensor, "b f"] | None
    ) -> NestedOutput:
        groups = zip(sparse.split_by_group(code, self.sizes), self.W_dec.split(self.sizes), strict=True)
        nothing = torch.zeros_like(self.b_dec)
        levels = tuple(accumulate((sparse.decode(z, W, nothing) for z, W in groups), initial=self.decoder_offset(x)))
        return NestedOutput(x, target, levels[-1], code, h, levels)

    def reconstruction(self, out: SAEOutput) -> Tensor:
        assert isinstance(out, NestedOutput)
        levels = out.levels if self.include_bias_level else out.levels[1:]
        return torch.stack([losses.mse(out.target, x_hat) for x_hat in levels]).mean()


class MatryoshkaSAE(Nested, BatchTopKSAE):
    """Nested dictionaries (see Nested) with the rule of BatchTopK: the paper's."""


class MatryoshkaTopKSAE(Nested, TopKSAE):
    """Nested dictionaries (see Nested) with the rule of TopK: sae=matryoshka sae._target_=<this class>."""


def doubling_group_sizes(n_latents: int, d_in: int) -> list[int]:
    """The sizes of groups that end at 1/16, 1/8, 1/4, 1/2 and all of the latents, rounded down, but at d_in or later.

    The authors' groups end at d, 2 d, 4 d, 8 d and 16 d. A narrower prefix cannot span the activations: its latents
    must each stand for several features, and where features are equally frequent they do. (Rows of three out of 24
    planted features, d = 16, f = 48: with ends 3, 6, 12, 24, 48 training finds a lower loss, 0.0015, than the planted
    dictionary with the true codes has, 0.0017, and half of the features; with ends 24, 48 it finds nearly all.)
    """
    ends = [n_latents * sixteenths // 16 for sixteenths in (1, 2, 4, 8)]
    ends = [end for end in ends if d_in <= end < n_latents] + [n_latents]
    return [end - start for start, end in pairwise([0, *ends])]
