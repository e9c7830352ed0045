"""Trees of features: who is whose parent, who excludes whom, and what that does to strengths."""

import random
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Forest:
    """n_roots trees: each feature has `branching` children, down to `depth` levels below the roots.

    Features are numbered level by level, and children stand in the order of their parents. Of a share `exclusive` of
    the parents, drawn by `seed`, at most one child is active at a time.
    """

    n_roots: int
    branching: int
    depth: int
    exclusive: float
    seed: int

    @cached_property
    def generations(self) -> list[slice]:
        """The features of each level, from the roots down."""
        sizes = [self.n_roots * self.branching**level for level in range(self.depth + 1)]
        return [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]

    @property
    def size(self) -> int:
        return self.generations[-1].stop

    @property
    def n_parents(self) -> int:
        return self.generations[-1].start

    @property
    def parents(self) -> Int[Tensor, " n"]:
        """Each feature's parent; -1 for a root."""
        return torch.cat([torch.full((self.n_roots,), -1), self.repeat(torch.arange(self.n_parents))])

    @cached_property
    def is_exclusive(self) -> Bool[Tensor, " parents"]:
        """Which parents have at most one active child."""
        n = self.n_parents
        drawn = random.Random(self.seed).sample(range(n), int(n * self.exclusive))
        return torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(drawn, dtype=torch.long), True)

    def repeat(self, of_parents: Tensor) -> Tensor:
        """Return for each child what its parent has."""
        return of_parents.repeat_interleave(self.branching)

    def compensate(self, p: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Divide children's probabilities by their parents', and raise them by what rivals take."""
        parent, own = self.repeat(p[: self.n_parents]), p[self.n_roots : self.size]
        rivals = self.repeat(own.view(-1, self.branching).sum(dim=-1)) - own
        raised = own / parent * (1 + self.repeat(self.is_exclusive) * rivals.clamp_min(0) / parent)
        return torch.cat([p[: self.n_roots], raised, p[self.size :]]).clamp_max(1)

    def apply(
        self, strengths: Float[Tensor, "b n"], lots: Float[Tensor, "b m"], means: Float[Tensor, " n"] | None
    ) -> None:
        """Silence children that lose to a rival or whose parent is silent, in place, level by level.

        Of rivals the one with the largest lot wins. With `means`, children are scaled by their parent's strength over
        its mean.
        """
        for parents, children in pairwise(self.generations):
            parent = strengths[:, parents]
            child, lot = (t[:, children].unflatten(1, (-1, self.branching)) for t in (strengths, lots))
            winner = lot.masked_fill(child == 0, -1).argmax(dim=-1, keepdim=True)
            kept = torch.zeros_like(child).scatter(-1, winner, 1.0)
            kept = torch.where(self.is_exclusive[parents].to(child.device).unsqueeze(-1), kept, 1.0)
            gate = (parent > 0).to(child.dtype) if means is None else parent / means[parents]
            strengths[:, children] = (child * kept * gate.unsqueeze(-1)).flatten(1)
