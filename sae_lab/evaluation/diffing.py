"""Model diffing: whose feature a crosscoder's latent is, read from the norms of its decoder row.

The sources of the crosscoder are the activations of a base model, then those of a fine-tuned one. With |W_dec_i,A| and
|W_dec_i,B| the norms of latent i's row over the sources of each,

    relative_norm_i = |W_dec_i,B| / (|W_dec_i,A| + |W_dec_i,B|)

is 0 for a latent of the base model alone, 1 for one of the fine-tuned model alone, 1/2 for one of both. Norms are in
the SAE's units. `sae.normalize=per_token` gives every token of either model the same length: a model that is louder as
a whole, or on some tokens, then does not look like the owner of what both have in common. With `none` it does.

Lindsey et al. 2024, Sparse Crosscoders (Transformer Circuits); Minder, Dumas et al. 2025, arXiv 2504.02922.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Bounds of the relative norm; what lies between them belongs to no class.
BASE_ONLY = (0.0, 0.1)
SHARED = (0.4, 0.6)
TUNED_ONLY = (0.9, 1.0)
CLASSES = {"base_only": BASE_ONLY, "shared": SHARED, "tuned_only": TUNED_ONLY}
BETWEEN = "between"


def relative_norm(directions: Float[Tensor, "f s d"]) -> Float[Tensor, " f"]:
    """relative_norm_i; the first half of the sources is the base model's. 1/2 for a row of zeros."""
    base, tuned = (half.flatten(1).norm(dim=-1) for half in directions.chunk(2, dim=1))
    total = base + tuned
    return torch.where(total > 0, tuned / total, 0.5)


def cosine(directions: Float[Tensor, "f s d"]) -> Float[Tensor, " f"]:
    """cos(W_dec_i,A, W_dec_i,B): near 1 where fine-tuning left a shared feature's direction alone."""
    base, tuned = (half.flatten(1) for half in directions.chunk(2, dim=1))
    return F.cosine_similarity(base, tuned, dim=-1)


def class_of(ratio: float) -> str:
    """The class within whose bounds (both included) a relative norm lies."""
    return next((name for name, (low, high) in CLASSES.items() if low <= ratio <= high), BETWEEN)


def latent_table(directions: Float[Tensor, "f s d"], density: Float[Tensor, " f"]) -> pd.DataFrame:
    """One row a latent: latent, relative_norm, class, cosine, density (share of tokens on which it fires)."""
    ratio = relative_norm(directions).tolist()
    return pd.DataFrame(
        {
            "latent": range(len(ratio)),
            "relative_norm": ratio,
            "class": [class_of(r) for r in ratio],
            "cosine": cosine(directions).tolist(),
            "density": density.tolist(),
        }
    )


def class_counts(table: pd.DataFrame) -> dict[str, int]:
    """How many latents that fire at all fall into each class: latents_base_only, ..., latents_between.

    The decoder row of a latent that never fires is what it was at the start, which looks shared.
    """
    counts = table["class"][table["density"] > 0].value_counts()
    return {f"latents_{name}": int(counts.get(name, 0)) for name in (*CLASSES, BETWEEN)}
