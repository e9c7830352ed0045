"""Synthetic rows with planted features, and whether an SAE finds the features.

Rows are sparse sums of planted directions. The features form trees: a child is active only if its root is, which tempts
an SAE to merge the two (absorption, Chanin et al. 2024, arXiv 2409.14507; Matryoshka SAEs are designed to resist it,
Bussmann et al. 2025, arXiv 2503.17547). With n_sites > 1 the features of a row are at one site and the other sites hold
noise, so a router has to find the site.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from sae_lab.evaluation.metrics import batch_fvu
from sae_lab.ops.sparse import l0_per_row
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError
from sae_lab.runtime.screen import track
from sae_lab.saes.base import BaseSAE
from sae_lab.training.step import TrainingStep

FOUND = 0.9
"""A feature counts as found if a latent's direction has a cosine above this with it."""


class Rows(NamedTuple):
    """Synthetic activations, and the site of each row's features."""

    x: Float[Tensor, "b s d"]
    site: Int[Tensor, " b"]


@check_arguments
@dataclass(frozen=True)
class PlantedFeatures:
    """A dictionary of n_trees roots with n_children children each. The first n_trees features are the roots.

    All trees of a row's site are active with the same probability, such that `active` features are active on average.
    In an active tree the root is active and, with probability n_children / (n_children + 1), one child drawn uniformly.
    Strengths are uniform in [1, 2]. Tree t belongs to site t mod n_sites.

    Args:
        active: active features per row, on average.
        noise: standard deviation of the noise added to each dimension.

    Raises:
        UserError: `active` exceeds what a site has if all of its trees are active.
    """

    d_in: Annotated[int, Ge(2)]
    n_trees: Annotated[int, Ge(1)]
    n_children: Annotated[int, Ge(0)]
    active: Annotated[float, Gt(0)]
    n_sites: Annotated[int, Ge(1)] = 1
    noise: Annotated[float, Ge(0)] = 0.02
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        if self.active > (most := self.n_trees * self.per_tree / self.n_sites):
            raise SettingError(
                f"{{active}}={self.active} exceeds {most:g}, what the trees of a site have on average where all "
                "are active: lower it, or raise {n_trees}."
            )

    @cached_property
    def directions(self) -> Float[Tensor, "features d"]:
        """Random unit vectors with mean zero over d, so that centering a row does not change them."""
        generator = torch.Generator().manual_seed(self.seed)
        directions = torch.randn(self.n_trees * (1 + self.n_children), self.d_in, generator=generator)
        return F.normalize(directions - directions.mean(dim=-1, keepdim=True), dim=-1)

    @property
    def per_tree(self) -> float:
        """Active features of an active tree, on average."""
        return 1 + self.n_children / (self.n_children + 1)

    @property
    def home(self) -> Int[Tensor, " features"]:
        """Site of each feature."""
        trees = torch.arange(self.n_trees)
        return torch.cat([trees, trees.repeat_interleave(self.n_children)]) % self.n_sites

    def rows(self, n: int, generator: torch.Generator) -> Rows:
        """Draw n rows."""
        random = partial(torch.rand, generator=generator)
        site = torch.randint(self.n_sites, (n,), generator=generator)
        here = self.home[: self.n_trees] == site.unsqueeze(-1)
        root = here & (random(n, self.n_trees) < self.active * self.n_sites / self.per_tree / self.n_trees)
        child = (random(n, self.n_trees) * (self.n_children + 1)).long()  # n_children means no child
        children = F.one_hot(child, self.n_children + 1)[..., :-1].bool() & root.unsqueeze(-1)
        active = torch.cat([root, children.flatten(1)], dim=1)
        signal = (active * (1 + random(active.shape))) @ self.directions
        x = torch.randn(n, self.n_sites, self.d_in, generator=generator)
        x[torch.arange(n), site] = signal + self.noise * x[torch.arange(n), site]
        return Rows(x, site)


def train_on_planted(
    sae: BaseSAE,
    planted: PlantedFeatures,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    n_steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train on newly drawn rows without Lightning, then calibrate."""
    generator = torch.Generator().manual_seed(seed)
    step = TrainingStep(sae.train(), optimizer)
    for _ in track(range(n_steps), "training on planted features"):
        step(planted.rows(batch_size, generator).x)
        schedule.step()
    for i in range(20):
        sae.calibrate(planted.rows(batch_size, generator).x, i)


@torch.no_grad()
def recovery(sae: BaseSAE, planted: PlantedFeatures, n_rows: int = 8192) -> dict[str, float]:
    """Measure how much of the planted dictionary the SAE has, and how it codes new rows under its deployed rule.

    Each feature is matched with the latent whose decoder direction at the feature's site has the largest cosine.

        mmcs     mean of these cosines over the features (mean max cosine similarity)
        found    share of the features with a cosine above 0.9
        l0, fvu  on new rows; fvu is that of the features' site
        routed   routed SAEs: share of the rows for which the router chose the features' site

    `mmcs_roots`, `found_roots`, `mmcs_children` and `found_children` are those of roots and children alone.
    `place_roots` and `place_children` are the mean positions in the dictionary of the latents of found features, from 0
    (first) to 1 (last): nested dictionaries put general features first.
    """
    sae.eval()
    decoder = F.normalize(sae.directions(), dim=-1)
    best, latent = torch.einsum("id,fid->if", planted.directions, decoder[:, planted.home]).max(dim=-1)
    x, site = planted.rows(n_rows, torch.Generator().manual_seed(planted.seed + 10**6))
    x_hat, code = sae.autoencode(x)
    rows, covers = torch.arange(n_rows), sae.predicted_mask(x)
    figures = {"mmcs": best.mean(), "found": (best > FOUND).float().mean()}
    for name, part in (("roots", slice(0, planted.n_trees)), ("children", slice(planted.n_trees, None))):
        if len(best[part]):
            figures[f"mmcs_{name}"] = best[part].mean()
            figures[f"found_{name}"] = (best[part] > FOUND).float().mean()
        if (best[part] > FOUND).any():
            figures[f"place_{name}"] = latent[part][best[part] > FOUND].float().mean() / sae.n_latents
    figures |= {"l0": l0_per_row(code).float().mean(), "fvu": batch_fvu(x[rows, site], x_hat[rows, site])}
    if covers is not None:
        figures["routed"] = covers[rows, site].float().mean()
    return {name: float(value) for name, value in figures.items()}
