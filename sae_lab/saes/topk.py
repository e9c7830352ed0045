"""TopK: exactly k latents a row."""

from typing import Any

from sae_lab.ops.selection import Pieces, select_top_k
from sae_lab.ops.sparse import SparseCode
from sae_lab.runtime.errors import UserError
from sae_lab.saes.sparse_linear import SparseLinearSAE


class TopKSAE(SparseLinearSAE):
    """z = TopK_k(relu(h)): on each row the k largest positive pre-activations stay, the others are zero.

    Gao et al. 2024, arXiv 2406.04093.

    Raises:
        UserError: k is not a whole number between 1 and the size of the dictionary.
    """

    def __init__(self, k: int, **sparse: Any):
        super().__init__(k=k, **sparse)
        if k != int(k):
            raise UserError(f"k={k} must be a whole number here: only a batch-wise rule can have k={k} on average.")
        self.k = int(k)

    def select(self, h: Pieces) -> SparseCode:
        return select_top_k(h, round(self.current_k))
