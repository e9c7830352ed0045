"""Rows as SynthSAEBench defines them: a hierarchy of features with correlations, frequencies and magnitudes.

Chanin and Garriga-Alonso 2026, arXiv 2602.14687. With the same settings and seed the tables of this file (directions,
bias, probabilities, magnitudes, correlations, who excludes whom) are those of its public generator; the rows are drawn
by another order of random numbers.
"""

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError
from sae_lab.studies.forest import Forest
from sae_lab.studies.planted_rows import PlantedRows, Rows

LEAST_OWN = 0.01
"""Share of a feature's Gaussian that is its own at least, whatever `correlation`."""


@check_arguments
@dataclass(frozen=True)
class HierarchicalFeatures(PlantedRows):
    """A forest of features: n_roots roots, and `branching` children of each feature down to `depth` levels below.

        z = F e + sqrt(1 - |F_i|²) e'                e, e' standard normal; F_ij = correlation * normal, `rank` columns
        a_i = relu(mean_i + std_i normal)            where z_i > the normal quantile of 1 - p_i; else 0
        a_i = 0                                      for all but one child of an exclusive parent, drawn uniformly
        a_i = a_i a_parent / mean_parent             level by level; without scale_by_parent: a_i [a_parent > 0]
        x   = sum_i a_i direction_i + bias + noise

    Features are numbered level by level; those that the forest leaves over have no parent. Frequencies follow Zipf's
    law in that order: p_i is 1 / (i + 1)^exponent, moved and scaled to lie between min_probability and
    max_probability. Magnitudes mean_i fall linearly from the first feature to the last, and std_i is the absolute
    value of a normal number.

    Args:
        exclusive: share of the parents of which at most one child is active at a time.
        compensate: divide p_i by the parent's, and raise it by what rivals take, such that p_i is about the share of
            rows on which the feature is active.
        orthogonalize: Adam steps that lower sum_{i != j} (direction_i . direction_j)².
        bias: norm of a vector added to all rows.

    Raises:
        UserError: n_features is less than the forest has.
    """

    d_in: Annotated[int, Ge(2)]
    n_features: Annotated[int, Ge(2)]
    n_roots: Annotated[int, Ge(1)]
    branching: Annotated[int, Ge(2)]
    depth: Annotated[int, Ge(0)]
    exclusive: Annotated[float, Ge(0), Le(1)] = 1.0
    scale_by_parent: bool = True
    compensate: bool = True
    max_probability: Annotated[float, Gt(0), Le(1)] = 0.4
    min_probability: Annotated[float, Gt(0), Le(1)] = 5e-4
    exponent: Annotated[float, Gt(0)] = 0.5
    magnitude_first: Annotated[float, Gt(0)] = 5.0
    magnitude_last: Annotated[float, Gt(0)] = 4.0
    spread_mean: Annotated[float, Ge(0)] = 0.5
    spread_std: Annotated[float, Ge(0)] = 0.5
    rank: Annotated[int, Ge(1)] = 25
    correlation: Annotated[float, Ge(0)] = 0.1
    orthogonalize: Annotated[int, Ge(0)] = 100
    orthogonalize_lr: Annotated[float, Gt(0)] = 3e-4
    bias: Annotated[float, Ge(0)] = 0.5
    noise: Annotated[float, Ge(0)] = 0.0
    seed: Annotated[int, Ge(0)] = 0
    device: str = "cpu"

    n_sites = 1

    def __post_init__(self) -> None:
        if self.n_features < self.forest.size:
            raise SettingError(
                f"{{n_features}}={self.n_features} is less than the {self.forest.size} of the forest: raise it, or "
                "lower {n_roots}, {branching} or {depth}."
            )
        if self.min_probability >= self.max_probability:
            raise SettingError(f"{{min_probability}}={self.min_probability} must be below {{max_probability}}.")

    @cached_property
    def forest(self) -> Forest:
        """The features that are in trees, which are the first."""
        return Forest(self.n_roots, self.branching, self.depth, self.exclusive, self.seed + 3)

    @property
    def levels(self) -> dict[str, slice]:
        """Roots, all children, the children of each level, and the features that are in no tree."""
        roots, *below = self.forest.generations
        named = {"roots": roots, "children": slice(self.n_roots, self.forest.size)}
        named |= {f"level_{i}": level for i, level in enumerate(below, 1)}
        return named | {"unrelated": slice(self.forest.size, self.n_features)}

    @cached_property
    def parents(self) -> Int[Tensor, " n"]:
        """Each feature's parent; -1 for roots and for features that are in no tree."""
        return F.pad(self.forest.parents, (0, self.n_features - self.forest.size), value=-1).to(self.device)

    @cached_property
    def _drawn(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, " d"]]:
        generator = torch.Generator().manual_seed(self.seed)
        directions = F.normalize(torch.randn(self.n_features, self.d_in, generator=generator), dim=-1)
        offset = self.bias * F.normalize(torch.randn(self.d_in, generator=generator), dim=0)
        spread = spread_apart(directions.to(self.device), self.orthogonalize, self.orthogonalize_lr)
        return spread, offset.to(self.device)

    @property
    def directions(self) -> Float[Tensor, "n d"]:
        """Random unit vectors, moved apart."""
        return self._drawn[0]

    @property
    def offset(self) -> Float[Tensor, " d"]:
        """The vector that is in every row."""
        return self._drawn[1]

    @cached_property
    def probabilities(self) -> Float[Tensor, " n"]:
        """The share of rows on which each feature would be active without parents and rivals."""
        base = zipf(self.n_features, self.exponent, self.max_probability, self.min_probability)
        if not self.compensate or not self.depth:
            return base
        return self.forest.compensate(base)

    @cached_property
    def magnitudes(self) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Mean and standard deviation of each feature's strength where it is active."""
        mean = torch.linspace(self.magnitude_first, self.magnitude_last, self.n_features)
        normal = torch.randn(self.n_features, generator=torch.Generator().manual_seed(self.seed + 1))
        return mean.to(self.device), (self.spread_mean + self.spread_std * normal).abs().to(self.device)

    @cached_property
    def copula(self) -> tuple[Float[Tensor, "n rank"], Float[Tensor, " n"], Float[Tensor, " n"]]:
        """F, the standard deviation of each feature's own part of z, and the threshold of z."""
        normal = torch.randn(self.n_features, self.rank, generator=torch.Generator().manual_seed(self.seed + 4))
        factor = self.correlation * normal
        shared = factor.square().sum(dim=1)
        factor = factor * ((1 - LEAST_OWN) / shared.clamp_min(1 - LEAST_OWN)).sqrt().unsqueeze(1)
        own = (1 - factor.square().sum(dim=1)).sqrt()
        threshold = math.sqrt(2) * torch.erfinv(1 - 2 * self.probabilities)
        return factor.to(self.device), own.to(self.device), threshold.to(self.device)

    def rows(self, n: int, generator: torch.Generator) -> Rows:
        """Draw n rows."""
        normal = partial(torch.randn, generator=generator, device=generator.device)
        (factor, own, threshold), (mean, std) = self.copula, self.magnitudes
        z = normal(n, self.rank) @ factor.T + own * normal(n, self.n_features)
        strengths = (mean + std * normal(n, self.n_features)).relu() * (z > threshold)
        lots = torch.rand(n, self.forest.size, generator=generator, device=generator.device)
        self.forest.apply(strengths, lots, mean if self.scale_by_parent else None)
        x = strengths @ self.directions + self.offset
        if self.noise:
            x = x + self.noise * normal(n, self.d_in)
        return Rows(x.unsqueeze(1), torch.zeros(n, dtype=torch.long, device=x.device), strengths)


def zipf(n: int, exponent: float, largest: float, smallest: float) -> Float[Tensor, " n"]:
    """Return 1 / rank^exponent, moved and scaled to go from `largest` to `smallest`."""
    powers = 1 / torch.arange(1, n + 1, dtype=torch.float32) ** exponent
    return smallest + (largest - smallest) * (powers - powers[-1]) / (powers[0] - powers[-1])


def spread_apart(directions: Float[Tensor, "n d"], n_steps: int, lr: float) -> Float[Tensor, "n d"]:
    """Lower sum_{i != j} (d_i . d_j)² + n sum_i (|d_i|² - 1)² by Adam, and return unit vectors.

    The gradient is 4 (D Dᵀ D - |d_i|² d_i + n (|d_i|² - 1) d_i). D (Dᵀ D) costs n d² and not n² d.
    """
    moved = directions.clone()
    adam = torch.optim.Adam([moved], lr=lr)
    for _ in range(n_steps):
        norms = moved.square().sum(dim=1, keepdim=True)
        moved.grad = 4 * (moved @ (moved.T @ moved) + (len(moved) * (norms - 1) - norms) * moved)
        adam.step()
    return F.normalize(moved, dim=-1)
