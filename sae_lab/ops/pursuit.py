"""Inference-time optimisation: codes that are searched for in a dictionary instead of computed by an encoder.

For rows y = x - b_dec and a dictionary D of unit rows, each pursuit spends k steps on

    min_w |y - w D|²    with w >= 0 and at most k entries of w positive

A step takes the residual r = y - w D, its correlations c = r Dᵀ, the best latent j = argmax_f c_f, and as active set
S = {i : w_i > 0} ∪ {j}. They differ in what they do with S:

    matching pursuit             w_j += relu(c_j)                                    Mallat and Zhang 1993
    gradient pursuit             w <- relu(w + α g),  g = c on S,  α = |g|² / |g D|²  Blumensath and Davies 2008
    orthogonal matching pursuit  w <- argmin |y - w D|² over the w that live on S    Pati et al. 1993

α is the exact line search, for on S the gradient g has ⟨g D, r⟩ = |g|². A latent may be chosen twice, and a weight may
be clipped to zero, so L0 can end below k. Rows of D that are not of unit norm are divided by it, or long rows would be
chosen for their length; the code is in the units of D again. Where a least-squares weight comes out negative, its
latent leaves S and the others are solved for again.

What a step costs is c, taken for a piece of the rows at a time, of which only the largest entry and those on S are
kept; everything else touches the at most k active entries of a row. Where the Gram matrix D Dᵀ fits into memory,
c = y Dᵀ - w D Dᵀ: one product at the start, then in each step t rows of the Gram matrix for a row that has chosen t
latents. Elsewhere every step is a product. Measured at b 4096, f 12288, d 768, k 32 on 2 cores of an EPYC (Zen 4), a
whole gradient pursuit took 8.7 s: 0.71 products a step with the Gram matrix, bound by memory, and 1.11 without, where a
tenth goes into the largest entry; the matrix costs f / b products, once for a dictionary.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.ops.matmul import linear
from sae_lab.ops.selection import PIECE
from sae_lab.ops.sparse import Pattern, SparseCode, dot_products

GRAM_ENTRIES = {"cpu": 2**28, "cuda": 0}
"""The largest Gram matrix that is kept: 1 GiB in float32. A GPU's products are too fast for it to pay."""


class Dictionary:
    """The rows of D, of any norm, prepared for pursuits: `unit` rows, their `norms`, the `gram` matrix or None."""

    def __init__(self, rows: Float[Tensor, "f n"], gram: bool = True):
        self.norms = rows.norm(dim=1).clamp_min(torch.finfo(rows.dtype).tiny)
        self.unit = rows / self.norms.unsqueeze(1)
        gram = gram and len(rows) ** 2 <= GRAM_ENTRIES[rows.device.type]
        self.gram = linear(self.unit, self.unit) if gram else None

    def __len__(self) -> int:
        return len(self.unit)


class Search(ABC):
    """One pursuit over some rows after t steps: the latent that each step chose, and its weight (D of unit rows)."""

    def __init__(self, y: Float[Tensor, "b n"], dictionary: Dictionary):
        self.y, self.dictionary = y, dictionary
        self.start = None if dictionary.gram is None else linear(y, dictionary.unit)
        self.latents = y.new_empty(len(y), 0, dtype=torch.long)
        self.weights = y.new_empty(len(y), 0)
        self.first = y.new_empty(len(y), 0, dtype=torch.bool)
        """Where a latent was chosen for the first time: only there it has a weight."""

    def run(self, k: int) -> "Search":
        for _ in range(k):
            c = self.correlations()
            j = argmax(c).unsqueeze(1)
            seen = (self.first & (self.latents == j)).any(dim=1, keepdim=True)
            self.first, self.latents = torch.cat([self.first, ~seen], dim=1), torch.cat([self.latents, j], dim=1)
            self.weights = F.pad(self.weights, (0, 1))
            self.weights = self.update(self.first & (self.latents == j), c.gather(1, self.latents))
        return self

    def correlations(self) -> Float[Tensor, "b f"]:
        """(y - w D) Dᵀ."""
        unit, gram = self.dictionary.unit, self.dictionary.gram
        if gram is None or self.start is None:
            return linear(self.y - self.combine(self.weights, unit), unit)
        return self.start - self.combine(self.weights, gram)

    @abstractmethod
    def update(self, new: Bool[Tensor, "b t"], c: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
        """The weights after this step; `new` is where j stands, c the correlations of all that were chosen so far."""

    def active(self, new: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
        """S."""
        return (self.weights > 0) | new

    def combine(self, weights: Float[Tensor, "b t"], rows: Float[Tensor, "f m"]) -> Float[Tensor, "b m"]:
        """The weighted sum of the rows of the latents chosen so far."""
        if self.latents.shape[1] == 0:
            return rows.new_zeros(len(weights), rows.shape[1])
        return F.embedding_bag(self.latents, rows, mode="sum", per_sample_weights=weights)

    def code(self) -> SparseCode:
        n_latents = len(self.dictionary)
        latents, order = torch.where(self.weights > 0, self.latents, n_latents).sort(dim=1)
        kept = latents < n_latents
        row_offsets = F.pad(kept.sum(dim=1).cumsum(0), (1, 0))
        pattern = Pattern(row_offsets, latents[kept], n_latents)
        return SparseCode(pattern, self.weights.gather(1, order)[kept] / self.dictionary.norms[pattern.latents])


class MatchingPursuit(Search):
    def update(self, new: Tensor, c: Tensor) -> Tensor:
        return self.weights + new * c.relu()


class GradientPursuit(Search):
    def update(self, new: Tensor, c: Tensor) -> Tensor:
        g = c * self.active(new)
        reach = self.combine(g, self.dictionary.unit).square().sum(dim=1, keepdim=True)
        length = torch.where(reach > 0, g.square().sum(dim=1, keepdim=True) / reach, 0)  # no residual, no direction
        return (self.weights + length * g).relu()


class OrthogonalMatchingPursuit(Search):
    def __init__(self, y: Float[Tensor, "b n"], dictionary: Dictionary):
        super().__init__(y, dictionary)
        self.gram = y.new_empty(len(y), 0, 0)
        """Products of the chosen latents with each other."""

    def update(self, new: Tensor, c: Tensor) -> Tensor:
        b, t = c.shape
        offsets = torch.arange(0, b * t + 1, t, device=c.device)
        latest = self.dictionary.unit[self.latents[:, -1]]
        row = dot_products(offsets, self.latents.flatten(), latest, self.dictionary.unit).view(b, t)
        self.gram = F.pad(self.gram, (0, 1, 0, 1))
        self.gram[:, -1], self.gram[:, :, -1] = row, row
        target = c + (self.gram @ self.weights.unsqueeze(-1)).squeeze(-1)  # y Dᵀ, from (y - w D) Dᵀ
        active = self.active(new)
        while True:
            weights = least_squares(self.gram, target, active)
            if bool((weights >= 0).all()):
                return weights
            active = active & (weights > 0)


def least_squares(
    gram: Float[Tensor, "b t t"], b: Float[Tensor, "b t"], active: Bool[Tensor, "b t"]
) -> Float[Tensor, "b t"]:
    """gram⁻¹ b over the active entries of each row, zero elsewhere; a tiny ridge lets equal atoms share a weight."""
    both = active.unsqueeze(1) & active.unsqueeze(2)
    ridge = 1 + 8 * torch.finfo(gram.dtype).eps
    system = torch.where(both, gram, 0).diagonal_scatter(torch.where(active, ridge, 1.0).to(gram), dim1=1, dim2=2)
    factor = torch.linalg.cholesky(system)
    return torch.cholesky_solve((b * active).unsqueeze(-1), factor).squeeze(-1) * active


METHODS: dict[str, type[Search]] = {
    "matching_pursuit": MatchingPursuit,
    "gradient_pursuit": GradientPursuit,
    "orthogonal_matching_pursuit": OrthogonalMatchingPursuit,
}


def argmax(c: Float[Tensor, "b f"]) -> Int[Tensor, " b"]:
    """The place of each row's largest entry; numpy's AVX-512 finds it 16 x faster than torch."""
    return torch.from_numpy(c.numpy().argmax(axis=1)) if c.device.type == "cpu" else c.argmax(dim=1)


@torch.no_grad()
def pursue(method: str, y: Float[Tensor, "b n"], dictionary: Dictionary, k: int) -> SparseCode:
    """The code of each row of y after k steps of `method`, a key of METHODS. Autocast is left out: residuals cancel."""
    rows = max(512, PIECE[y.device.type] // len(dictionary))
    with torch.autocast(y.device.type, enabled=False):
        return concatenate_codes([METHODS[method](piece, dictionary).run(k).code() for piece in y.split(rows)])


def concatenate_codes(codes: list[SparseCode]) -> SparseCode:
    """The codes of consecutive pieces of rows, as one."""
    counts = torch.cat([code.row_offsets.diff() for code in codes])
    latents = torch.cat([code.latents for code in codes])
    pattern = Pattern(F.pad(counts.cumsum(0), (1, 0)), latents, codes[0].n_latents)
    return SparseCode(pattern, torch.cat([code.values for code in codes]))
