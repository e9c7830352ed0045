"""Trees of two levels: roots, and children that are active only with their root.

That tempts an SAE to merge the two (absorption, Chanin et al. 2024, arXiv 2409.14507; Matryoshka SAEs are designed to
resist it, Bussmann et al. 2025, arXiv 2503.17547). With n_sites > 1 the features of a row are at one site and the other
sites hold noise, so a router has to find the site.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError
from sae_lab.studies.planted_rows import PlantedRows, Rows


@check_arguments
@dataclass(frozen=True)
class PlantedFeatures(PlantedRows):
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
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.active > (most := self.n_trees * self.per_tree / self.n_sites):
            raise SettingError(
                f"{{active}}={self.active} exceeds {most:g}, what the trees of a site have on average where all "
                "are active: lower it, or raise {n_trees}."
            )

    @cached_property
    def directions(self) -> Float[Tensor, "n d"]:
        """Random unit vectors with mean zero over d, so that centering a row does not change them."""
        generator = torch.Generator().manual_seed(self.seed)
        directions = torch.randn(self.n_trees * (1 + self.n_children), self.d_in, generator=generator)
        return F.normalize(directions - directions.mean(dim=-1, keepdim=True), dim=-1).to(self.device)

    @property
    def per_tree(self) -> float:
        """Active features of an active tree, on average."""
        return 1 + self.n_children / (self.n_children + 1)

    @cached_property
    def parents(self) -> Int[Tensor, " n"]:
        """The root of each child."""
        trees = torch.arange(self.n_trees, device=self.device)
        return torch.cat([torch.full_like(trees, -1), trees.repeat_interleave(self.n_children)])

    @property
    def levels(self) -> dict[str, slice]:
        """Roots and children."""
        return {"roots": slice(0, self.n_trees), "children": slice(self.n_trees, len(self.parents))}

    @property
    def home(self) -> Int[Tensor, " n"]:
        """Site of each feature."""
        trees = torch.arange(self.n_trees, device=self.device)
        return torch.cat([trees, trees.repeat_interleave(self.n_children)]) % self.n_sites

    def rows(self, n: int, generator: torch.Generator) -> Rows:
        """Draw n rows."""
        random = partial(torch.rand, generator=generator, device=generator.device)
        site = torch.randint(self.n_sites, (n,), generator=generator, device=generator.device)
        here = self.home[: self.n_trees] == site.unsqueeze(-1)
        root = here & (random(n, self.n_trees) < self.active * self.n_sites / self.per_tree / self.n_trees)
        child = (random(n, self.n_trees) * (self.n_children + 1)).long()  # n_children means no child
        children = F.one_hot(child, self.n_children + 1)[..., :-1].bool() & root.unsqueeze(-1)
        active = torch.cat([root, children.flatten(1)], dim=1)
        strengths = active * (1 + random(*active.shape))
        x = torch.randn(n, self.n_sites, self.d_in, generator=generator, device=generator.device)
        each = torch.arange(n, device=x.device)
        x[each, site] = strengths @ self.directions + self.noise * x[each, site]
        return Rows(x, site, strengths)
