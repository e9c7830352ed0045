"""Which latents fire on the same tokens."""

from typing import Any

import numpy as np
import torch

from sae_lab.evaluation.latent_activations import Activations

MOST_POSITIONS = 20_000
"""Activations of a latent that are looked at, spread evenly: the cost is their number times L0, for each latent."""


def describe_cofiring(activations: Activations, n: int, n_most: int) -> list[list[dict[str, Any]]]:
    """Return, for each of the n latents, those that fire on the same tokens most often, as indices among the n.

    `jaccard` is |A ∩ B| / |A ∪ B|, where A and B are the tokens on which the two fire; `share` is |A ∩ B| / |A|. A
    latent that fires nearly everywhere has a large share with every other one and a small index of Jaccard.
    """
    latents, positions = activations.latents.numpy(), activations.positions.numpy()
    counts = np.bincount(latents, minlength=n)
    places, starts = np.unique(positions, return_index=True)  # entries are in the order of the text
    ends = np.append(starts[1:], len(positions))
    place_of_entry = np.searchsorted(places, positions)
    order = torch.argsort(activations.latents, stable=True).numpy()
    found = []
    for mine in np.split(order, np.cumsum(counts)[:-1]):
        some = mine[:: -(-len(mine) // MOST_POSITIONS) or 1]
        at = place_of_entry[some]
        together = np.bincount(latents[ranges(starts[at], ends[at])], minlength=n) if len(some) else np.zeros(n)
        found.append(most_together(together * (len(mine) / max(1, len(some))), counts, latents[mine[:1]], n_most))
    return found


def most_together(
    together: np.ndarray[Any, Any], counts: np.ndarray[Any, Any], own: np.ndarray[Any, Any], n_most: int
) -> list[dict[str, Any]]:
    """Return the latents of largest Jaccard index with the latent `own`, which is empty if it never fires."""
    if not len(own):
        return []
    together[own] = 0
    other = together.nonzero()[0]
    jaccard = together[other] / (counts[own] + counts[other] - together[other])
    best = np.argsort(-jaccard, kind="stable")[:n_most]
    share = together[other] / counts[own]
    columns = (column[best].tolist() for column in (other, jaccard, share))
    return [{"latent": i, "jaccard": round(j, 4), "share": round(s, 4)} for i, j, s in zip(*columns, strict=True)]


def ranges(starts: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Concatenate the ranges starts[i] ... ends[i] - 1."""
    sizes = ends - starts
    return np.arange(sizes.sum()) + np.repeat(starts - np.append(0, sizes.cumsum()[:-1]), sizes)
