"""Compare the dictionaries of SAEs: which latents they share, one to one, and which are only in one of them."""

import logging
from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae_lab.ops.assignment import assign
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

log = logging.getLogger(__name__)

SHARED, CLOSE = 0.7, 0.9
"""Cosines from which on two latents count as one: 0.7 as in "Sparse Autoencoders Trained on the Same Data Learn
Different Features" (https://arxiv.org/abs/2501.16615), and a stricter one."""
LARGEST = 8192
"""Latents up to which the matching is the best one; for more it takes hours."""


class Comparison(NamedTuple):
    """What two dictionaries have in common.

    Attributes:
        numbers: by name; see `compare_dictionaries`.
        latents: one row per latent of either SAE: `sae`, `latent`, `partner` (-1: none), `cosine` with the partner,
            `nearest` (the latent of the other SAE with the largest cosine) and `max_cosine` with that one.
    """

    numbers: dict[str, Any]
    latents: pd.DataFrame


def compare_all(saes: Mapping[str, BaseSAE]) -> dict[tuple[str, str], Comparison]:
    """Compare each pair of SAEs, by their names."""
    return {(a, b): compare_dictionaries(saes[a], saes[b], (a, b)) for a, b in combinations(saes, 2)}


@torch.no_grad()
def compare_dictionaries(a: BaseSAE, b: BaseSAE, names: tuple[str, str] = ("a", "b")) -> Comparison:
    """Match the latents of two SAEs one to one, such that the sum of the cosines of their decoder rows is largest.

    Of signed codes, absolute cosines count. Matched latents of a cosine of at least 0.7 are shared; all others are own
    ones of their SAE. Above LARGEST latents, only latents that are each other's nearest are matched.

    `numbers` holds `matching` (hungarian or mutual_nearest), `n_shared`, `n_own` of either, `mean_matched_cosine`,
    `matched_above_0.7` and `matched_above_0.9` (shares of the smaller dictionary), and of either SAE
    `mean_max_cosine`, the mean over its latents of the largest cosine with a latent of the other, and the shares
    `max_above_0.7`, `max_above_0.9`.

    Raises:
        UserError: their rows have different widths.
    """
    rows = [F.normalize(sae.directions().float().flatten(1), dim=1) for sae in (a, b)]
    if rows[0].shape[1] != rows[1].shape[1]:
        sizes = " and ".join(f"{name} has {row.shape[1]}" for name, row in zip(names, rows, strict=True))
        raise UserError(f"{sizes} numbers (sites x d) in a decoder row: compare SAEs of one width and number of sites.")
    if bool(a.n_inputs) != bool(b.n_inputs):
        transcoder, plain = names if a.n_inputs else names[::-1]
        log.warning(
            "%s is a transcoder and %s is not: cosines mean something only if both write to one site.",
            transcoder,
            plain,
        )
    cosines = rows[0] @ rows[1].T
    if a.signed or b.signed:
        cosines = cosines.abs()
    matching = "hungarian" if max(cosines.shape) <= LARGEST else "mutual_nearest"
    left, right = match(cosines, matching)
    matched = cosines[left, right]
    n_shared = int((matched >= SHARED).sum())
    tables, numbers = [], dict[str, Any](matching=matching, n_shared=n_shared)
    for name, scores, own, other in ((names[0], cosines, left, right), (names[1], cosines.T, right, left)):
        best, nearest = scores.max(dim=1)
        partner, cosine = torch.full((len(scores),), -1), torch.full((len(scores),), torch.nan)
        partner[own], cosine[own] = other, matched
        columns = {"latent": torch.arange(len(scores)), "partner": partner, "cosine": cosine}
        columns |= {"nearest": nearest, "max_cosine": best}
        tables.append(pd.DataFrame({"sae": name} | {key: value.numpy() for key, value in columns.items()}))
        numbers |= {f"n_own.{name}": len(scores) - n_shared, f"mean_max_cosine.{name}": best.mean().item()}
        numbers |= {f"max_above_{t}.{name}": share(best, t, len(best)) for t in (SHARED, CLOSE)}
    smaller = min(cosines.shape)
    numbers |= {"mean_matched_cosine": matched.mean().item() if len(matched) else 0.0}
    numbers |= {f"matched_above_{t}": share(matched, t, smaller) for t in (SHARED, CLOSE)}
    return Comparison(numbers, pd.concat(tables, ignore_index=True))


def match(cosines: Float[Tensor, "f g"], matching: str) -> tuple[Tensor, Tensor]:
    """Return the matched rows, in order, and the column of each. A negative cosine is no worse than 0."""
    if matching == "hungarian":
        return tuple(torch.from_numpy(indices) for indices in assign(cosines.clamp_min(0).double().numpy()))  # type: ignore[return-value]
    nearest, back = cosines.argmax(dim=1), cosines.argmax(dim=0)
    rows = torch.arange(len(cosines))[back[nearest] == torch.arange(len(cosines))]
    return rows, nearest[rows]


def share(values: Tensor, threshold: float, n: int) -> float:
    """Return how many values reach the threshold, as a share of n."""
    return int((values >= threshold).sum()) / n


def agreement(comparisons: Mapping[tuple[str, str], Comparison]) -> dict[str, float]:
    """Return means over all pairs: how well SAEs that differ by their seed agree."""
    found = [comparison.numbers for comparison in comparisons.values()]
    max_cosines = [value for one in found for key, value in one.items() if key.startswith("mean_max_cosine.")]
    means = {"mean_max_cosine": sum(max_cosines) / len(max_cosines)}
    for name in ("mean_matched_cosine", f"matched_above_{SHARED}", f"matched_above_{CLOSE}"):
        means[name] = sum(one[name] for one in found) / len(found)
    return means
