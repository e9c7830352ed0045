"""Temporal SAE: a part of the latents that changes slowly along a text."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from sae_lab.ops import losses, sparse
from sae_lab.ops.sparse import Code, SparseCode
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.matryoshka import MatryoshkaSAE, NestedOutput


@dataclass(frozen=True)
class TemporalOutput(NestedOutput):
    """Output of a forward pass on pairs, with the code of the tokens before."""

    previous: Code | None = None


class TemporalSAE(MatryoshkaSAE):
    """Matryoshka SAE whose first group of latents, the high-level ones, finds each token's predecessor.

        loss = matryoshka's + temporal_coefficient · L / (s·d)
        L    = -½ mean_t (log softmax_u(a_t · p_u) + log softmax_u(a_u · p_t)) at u = t

    a_t are the high-level latents of token t, p_t those of the token before it in the same document, and u runs over
    the tokens of the batch. Latents that stay the same along a text lower L, latents of single tokens do not, so the
    former gather in the first group.

    Training batches are pairs (b, 2·s, d), the token and the token before. Only the token is reconstructed, and sets
    the threshold and the counters; the choice among the latents of the tokens before is a BatchTopK of its own. Rows
    without predecessors, (b, s, d), are trained without L. Nothing changes in `eval()` mode, so a trained one is a
    Matryoshka SAE, and is exported as such.

    Bhalla et al. 2025, arXiv 2511.05541. As in the authors' code, the products are of raw latents, without a
    temperature. Their weights differ: the groups count 0.2 and 0.8, and L 0.1 beside half of a squared error that is
    summed over the dimensions. Here the groups count the same; 0.2 weighs L as there.

    Args:
        n_latents: f, the size of the dictionary.
        temporal_coefficient: weight of L; 0: the SAE is a Matryoshka SAE.
        group_sizes: number of latents that each group adds. None: a fifth and the rest.

    Raises:
        UserError: the coefficient is negative.
    """

    shardable = True
    reads_previous = True

    def __init__(
        self,
        n_latents: Annotated[int, Ge(1)],
        temporal_coefficient: Annotated[float, Ge(0)] = 0.2,
        group_sizes: Sequence[Annotated[int, Ge(1)]] | None = None,
        **matryoshka: Any,
    ):
        high = max(1, n_latents // 5)
        sizes = [high, n_latents - high] if group_sizes is None and n_latents > 1 else group_sizes
        super().__init__(n_latents=n_latents, group_sizes=sizes, **matryoshka)
        self.temporal_coefficient, self.group_sizes = temporal_coefficient, group_sizes

    def deployed(self) -> MatryoshkaSAE:
        return self.convert_to(MatryoshkaSAE, group_sizes=self.sizes)

    def forward(self, x: Tensor) -> SAEOutput:
        if not self.training or x.ndim != 3 or x.shape[1] != 2 * self.n_sources:
            return super().forward(x)
        now, before = x.tensor_split(2, dim=1)
        out = super().forward(now)
        previous = self.code(self.read(before)[0])
        known = {field.name: getattr(out, field.name) for field in fields(out)}
        return TemporalOutput(**known, previous=previous)

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        terms = super().losses(out)
        if isinstance(out, TemporalOutput) and out.previous is not None and self.temporal_coefficient:
            contrast = losses.contrast(self.high_level(out.code), self.high_level(out.previous))
            terms["temporal"] = self.temporal_coefficient * contrast / out.target[0].numel()
        return terms

    def high_level(self, code: Code) -> Float[Tensor, "b high"]:
        """Return the latents of the first group that this process holds, dense."""
        first = sparse.split_by_group(code, self.own_sizes)[0]
        return first.to_dense() if isinstance(first, SparseCode) else first
