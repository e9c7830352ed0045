"""Model diffing: classify the latents of a crosscoder by the model to which they belong.

The sources of the crosscoder are the activations of a base model (A), then those of a fine-tuned model (B). |W_dec_i,A|
and |W_dec_i,B| are the norms of latent i's decoder row over the sources of each model, and

    relative_norm_i = |W_dec_i,B| / (|W_dec_i,A| + |W_dec_i,B|)

is 0 for a latent of the base model alone, 1 for one of the fine-tuned model alone, and 1/2 for a shared one. Norms are
in the SAE's units. Use `sae.normalize=per_token`, which gives all activations of both models the same norm. With
`none`, shared latents look as if they belonged to the model with the larger activations.

Lindsey et al. 2024, Sparse Crosscoders (Transformer Circuits); Minder, Dumas et al. 2025, arXiv 2504.02922.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae_lab.parallel.shards import concatenate_shards

# Bounds of the relative norm. Values outside of all three classes are counted as BETWEEN.
BASE_ONLY = (0.0, 0.1)
SHARED = (0.4, 0.6)
TUNED_ONLY = (0.9, 1.0)
CLASSES = {"base_only": BASE_ONLY, "shared": SHARED, "tuned_only": TUNED_ONLY}
BETWEEN = "between"


def relative_norm(directions: Float[Tensor, "f s d"]) -> Float[Tensor, " f"]:
    """Compute relative_norm_i, 1/2 for a row of zeros. The first half of the sources belongs to the base model."""
    base, tuned = (half.flatten(1).norm(dim=-1) for half in directions.chunk(2, dim=1))
    total = base + tuned
    return torch.where(total > 0, tuned / total, 0.5)


def cosine(directions: Float[Tensor, "f s d"]) -> Float[Tensor, " f"]:
    """Compute cos(W_dec_i,A, W_dec_i,B), which is near 1 if fine-tuning kept the direction of a shared feature."""
    base, tuned = (half.flatten(1) for half in directions.chunk(2, dim=1))
    return F.cosine_similarity(base, tuned, dim=-1)


def class_of(ratio: float) -> str:
    """Return the class of a relative norm. Bounds are inclusive."""
    return next((name for name, (low, high) in CLASSES.items() if low <= ratio <= high), BETWEEN)


def latent_table(directions: Float[Tensor, "f s d"], density: Float[Tensor, " f"]) -> pd.DataFrame:
    """Return a table with one row per latent: latent, relative_norm, class, cosine and density.

    Args:
        directions: those of the latents that this rank holds.
        density: of all latents.
    """
    ratio = concatenate_shards(relative_norm(directions)).tolist()
    return pd.DataFrame(
        {
            "latent": range(len(ratio)),
            "relative_norm": ratio,
            "class": [class_of(r) for r in ratio],
            "cosine": concatenate_shards(cosine(directions)).tolist(),
            "density": density.tolist(),
        }
    )


def class_counts(table: pd.DataFrame) -> dict[str, int]:
    """Count the latents in each class: latents_base_only, latents_shared, latents_tuned_only and latents_between.

    Latents that never fire are left out: their decoder rows are the initial ones, which look shared.
    """
    counts = table["class"][table["density"] > 0].value_counts()
    return {f"latents_{name}": int(counts.get(name, 0)) for name in (*CLASSES, BETWEEN)}
