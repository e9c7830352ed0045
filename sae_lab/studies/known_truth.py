"""What an SAE has of features that are known: which latents they have, how those fire, absorption and hedging.

W_i is the unit decoder row of the latent that is matched with feature i (with the sign of their cosine), d_i is its
direction, p the parent of a child c. A feature is tracked if its cosine with W_i exceeds 0.5.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.ops.assignment import assign
from sae_lab.saes.base import BaseSAE
from sae_lab.studies.planted_rows import PlantedRows

FOUND, TRACKED = 0.9, 0.5
"""Cosines above which a latent's direction counts as that of a feature, and as close to it."""
CARRIES = 0.1
"""A child's latent carries the parent's direction if its cosine with that is larger by this than the child's own is."""


@dataclass
class Matching:
    """Features and latents, by the cosines of their directions at each feature's site.

    Args:
        planted: the features.
        cosines: of each feature (n) with each latent (f).
        decoder: unit rows of each latent and site.
        signed: whether a latent may stand for a feature of the opposite direction.
    """

    planted: PlantedRows
    cosines: Float[Tensor, "n f"]
    decoder: Float[Tensor, "f s d"]
    signed: bool

    @classmethod
    def of(cls, sae: BaseSAE, planted: PlantedRows) -> "Matching":
        """Match the latents of an SAE with planted features."""
        decoder = F.normalize(sae.directions().detach(), dim=-1)
        home, cosines = planted.home, planted.directions.new_empty(len(planted.directions), len(decoder))
        for site in range(planted.n_sites):
            cosines[home == site] = planted.directions[home == site] @ decoder[:, site].T
        return cls(planted, cosines, decoder, sae.signed)

    @cached_property
    def latent(self) -> Int[Tensor, " n"]:
        """The latent of each feature, one to one, such that the sum of |cosines| is largest; -1: none is left."""
        features, latents = (torch.from_numpy(i) for i in assign(self.cosines.abs().cpu().numpy()))
        return torch.full((len(self.cosines),), -1).index_copy(0, features, latents).to(self.cosines.device)

    @cached_property
    def matched(self) -> Float[Tensor, " n"]:
        """Cosine of each feature with its latent; 0 where it has none."""
        return torch.where(self.latent < 0, 0, self.cosines.gather(1, self.latent.clamp_min(0).unsqueeze(1)).squeeze(1))

    @property
    def tracked(self) -> Bool[Tensor, " n"]:
        """Whether each feature has a latent whose direction is close to it."""
        return self.matched.abs() > TRACKED

    @cached_property
    def best_latent(self) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """The largest cosine of each feature, by absolute value where codes are signed, and its latent."""
        return (self.cosines.abs() if self.signed else self.cosines).max(dim=1)

    @cached_property
    def best_feature(self) -> Int[Tensor, " f"]:
        """The feature with the largest |cosine| with each latent; several latents may share one."""
        return self.cosines.abs().argmax(dim=0)

    def rows_of(self, features: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        """Return W_i of matched features."""
        rows = self.decoder[self.latent[features], self.planted.home[features]]
        return rows * self.matched[features].sign().unsqueeze(-1)

    def excess(self, of: Int[Tensor, " m"], on: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Return W_i . d_j - d_i . d_j: what W_i has of another feature beyond what its own feature has."""
        directions = self.planted.directions
        return ((self.rows_of(of) - directions[of]) * directions[on]).sum(dim=-1)

    def figures(self) -> dict[str, Tensor]:
        """Return the figures that depend on weights alone."""
        latents, n_matched = self.cosines.shape[1], (self.latent >= 0).sum()
        return {
            "mcc": self.matched.abs().sum() / n_matched,
            "uniqueness": torch.tensor(len(self.best_feature.unique()) / latents),
        } | self.mixtures()

    def mixtures(self) -> dict[str, Tensor]:
        """Return what latents have of their children's and parents' directions, where there are such pairs."""
        child, tracked = self.planted.children, self.tracked
        parent = self.planted.parents[child]
        both, lone = tracked[parent] & tracked[child], tracked[parent] & ~tracked[child]
        figures = {}
        if both.any():
            figures["parent_in_child"] = self.excess(child[both], parent[both]).mean()
        if lone.any():
            figures["child_in_parent"] = self.excess(parent[lone], child[lone]).mean()
        if rates := list(self.hedging_projections()):
            projected, expected = torch.tensor(rates).mean(dim=0)
            figures["hedging"] = ((projected - expected) / (1 - expected)).clamp_min(0)
        return figures

    def hedging_projections(self) -> Iterator[tuple[float, float]]:
        """Yield |P (W_i - d_i)| of each tracked feature with untracked relatives, and what P would give by chance.

        P projects onto the span of the feature's parent and children that no latent tracks.
        """
        parents, directions = self.planted.parents, self.planted.directions
        lost = ~self.tracked
        relatives: dict[int, list[int]] = {}
        for child, parent in zip(self.planted.children.tolist(), parents[self.planted.children].tolist(), strict=True):
            if lost[child] and not lost[parent]:
                relatives.setdefault(parent, []).append(child)
            if lost[parent] and not lost[child]:
                relatives.setdefault(child, []).append(parent)
        for feature, others in relatives.items():
            delta = (self.rows_of(torch.tensor([feature])) - directions[feature]).squeeze(0)
            basis = torch.linalg.qr(directions[others].T).Q
            chance = (len(others) / len(delta)) ** 0.5
            yield (basis.T @ delta).norm().item(), delta.norm().item() * chance


@dataclass
class Firing:
    """Counts over rows of how latents and features fire together."""

    matching: Matching
    n_rows: int = 0
    totals: dict[str, Tensor] = field(default_factory=dict)

    def update(self, fires: Bool[Tensor, "b f"], active: Bool[Tensor, "b n"]) -> None:
        """Add a batch: which latents fire, and which features are active."""
        truth = active[:, self.matching.best_feature]
        counts = {"hits": fires & truth, "fires": fires, "truths": truth, "active": active}
        counts |= self.families(fires, active)
        for name, events in counts.items():
            self.totals[name] = self.totals.get(name, 0) + events.sum(dim=0)
        self.n_rows += len(fires)

    def families(self, fires: Bool[Tensor, "b f"], active: Bool[Tensor, "b n"]) -> dict[str, Bool[Tensor, "b edges"]]:
        """Return which parents' latents are silent, beside an active child and without one."""
        child = self.matching.planted.children
        parent = self.matching.planted.parents[child]
        latent = self.matching.latent.clamp_min(0)  # only features that have one are counted later
        silent = ~fires[:, latent]
        child_active = active[:, child]
        has_child = torch.zeros_like(active, dtype=torch.int32).index_add_(1, parent, child_active.int()) > 0
        return {
            "child": child_active,
            "silent": child_active & silent[:, parent],
            "replaced": child_active & silent[:, parent] & fires[:, latent[child]],
            "alone": active & ~has_child,
            "alone_silent": active & ~has_child & silent,
        }

    def figures(self) -> dict[str, Tensor]:
        """Return the figures that depend on which latents fire."""
        hits, fires, truths = (self.totals[name].double() for name in ("hits", "fires", "truths"))
        figures = {
            "true_l0": self.totals["active"].sum() / self.n_rows,
            "precision": share(hits, fires).mean(),
            "recall": share(hits, truths).mean(),
            "f1": share(2 * hits, fires + truths).mean(),
            "accuracy": (1 - (fires + truths - 2 * hits) / self.n_rows).mean(),
        }
        return figures | self.absorption()

    @property
    def absorbing(self) -> Bool[Tensor, " edges"]:
        """Which children have a latent that carries the parent's direction, where both features are tracked."""
        child, tracked = self.matching.planted.children, self.matching.tracked
        parent = self.matching.planted.parents[child]
        both = tracked[parent] & tracked[child]
        return both & (self.matching.excess(child, parent) > CARRIES)

    def absorption(self) -> dict[str, Tensor]:
        """Return how often the latents of tracked parents miss their features, where there are such parents."""
        child, tracked = self.matching.planted.children, self.matching.tracked
        counted = tracked[self.matching.planted.parents[child]]
        if not self.totals["child"][counted].any():
            return {}
        figures = {
            "absorption": self.totals["replaced"][counted & self.absorbing].sum() / self.totals["child"][counted].sum(),
            "missed_with_child": self.totals["silent"][counted].sum() / self.totals["child"][counted].sum(),
        }
        is_parent = torch.zeros_like(tracked).index_fill(0, self.matching.planted.parents[child], True) & tracked
        if (alone := self.totals["alone"][is_parent].sum()) > 0:
            figures["missed_alone"] = self.totals["alone_silent"][is_parent].sum() / alone
        return figures

    def absorbed(self) -> Float[Tensor, " n"]:
        """Return the share of each child's rows on which its latent replaces its parent's; 0 for other features."""
        replaced = share(self.totals["replaced"] * self.absorbing, self.totals["child"]).float()
        zeros = torch.zeros(len(self.matching.matched), device=replaced.device)
        return zeros.index_copy(0, self.matching.planted.children, replaced)


def share(part: Tensor, whole: Tensor) -> Tensor:
    """Return part / whole in float64, and 0 where the whole is 0."""
    return part.double() / whole.double().clamp_min(1)


def feature_table(firing: Firing) -> pd.DataFrame:
    """Return a table with one row per feature: level, parent, frequency, latent and cosine, and how it is absorbed."""
    matching = firing.matching
    max_cosine, best_latent = matching.best_latent
    table = pd.DataFrame(
        {
            "feature": range(len(matching.matched)),
            "level": "",
            "parent": matching.planted.parents.tolist(),
            "frequency": (firing.totals["active"] / firing.n_rows).tolist(),
            "latent": matching.latent.tolist(),
            "cosine": matching.matched.abs().tolist(),
            "best_latent": best_latent.tolist(),
            "max_cosine": max_cosine.tolist(),
            "absorbed": firing.absorbed().tolist(),
        }
    )
    for name, part in matching.planted.levels.items():  # the narrower name comes later
        table.loc[part.start : part.stop - 1, "level"] = name
    return table
