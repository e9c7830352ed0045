"""TopK: k active latents per row."""

from typing import Annotated, Any

from sae_lab.ops.selection import Pieces, select_top_k
from sae_lab.ops.sparse import SparseCode
from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.saes.sparse_linear import SparseLinearSAE

WholeK = Annotated[int, ErrorMessage("must be a whole number here: only rules over the batch take a fraction")]


class TopKSAE(SparseLinearSAE):
    """TopK SAE: on each row the k largest positive pre-activations are kept, the others become zero.

        z = TopK_k(relu(h))        signed: z = h · 1[|h| is among the k largest]

    Gao et al. 2024, arXiv 2406.04093. With signed=true it is AbsTopK (see SparseLinearSAE).

    Args:
        k: the number of active latents per row.

    Raises:
        UserError: k is not a whole number between 1 and n_latents.
    """

    shardable = True

    def __init__(self, k: WholeK, **sparse: Any):
        super().__init__(k=k, **sparse)

    def select(self, h: Pieces) -> SparseCode:
        return select_top_k(h, round(self.current_k), self.signed)
