"""What is in a latent's decoder row: how it moves the logits of all tokens, and its largest dimensions."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from sae_lab.lm.base import LanguageModel
from sae_lab.saes.base import BaseSAE

N_BINS = 50
N_DIMENSIONS = 3


@torch.no_grad()
def describe_rows(sae: BaseSAE, lm: LanguageModel, latents: Int[Tensor, " c"]) -> list[dict[str, Any]]:
    """Describe the unit-norm decoder rows of the chosen latents.

    `logit_histogram` counts the logits that `describe_latents` shows the ends of: the row times the unembedding, minus
    the mean over the vocabulary. It is empty if the widths of site and unembedding differ. `largest_dimensions` are
    those of the largest weights, with each one's share of sum |weight|.
    """
    rows = F.normalize(sae.directions().float().flatten(1), dim=-1)
    unembedding = lm.unembedding()
    fits = unembedding is not None and unembedding.shape[1] == rows.shape[1]
    found: list[dict[str, Any]] = []
    for chunk in latents.to(rows.device).split(256):
        logits = rows[chunk] @ unembedding.to(rows).T if fits else rows.new_zeros(len(chunk), 0)  # type: ignore[union-attr]
        logits = (logits - logits.mean(dim=-1, keepdim=True)).cpu()
        largest = rows[chunk].topk(min(N_DIMENSIONS, rows.shape[1]))
        shares = largest.values.abs() / rows[chunk].abs().sum(dim=-1, keepdim=True)
        columns = zip(logits, largest.indices.tolist(), largest.values.tolist(), shares.tolist(), strict=True)
        for of_latent, indices, values, share in columns:
            dimensions = {"indices": indices, "values": rounded(values), "shares": rounded(share)}
            found.append({"logit_histogram": count(of_latent), "largest_dimensions": dimensions})
    return found


def count(values: Tensor) -> dict[str, list[Any]]:
    """Count values in equal bins between the smallest and the largest of them; bins are named by their middles."""
    if not len(values):
        return {"counts": [], "middles": []}
    counts, edges = np.histogram(values.numpy(), bins=N_BINS)
    return {"counts": counts.tolist(), "middles": rounded(((edges[1:] + edges[:-1]) / 2).tolist(), 5)}


def rounded(values: list[float], digits: int = 3) -> list[float]:
    return [round(value, digits) for value in values]
