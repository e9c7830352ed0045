"""Describe latents by what they do on a text: how often and how strongly they fire, on which tokens, and where."""

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.evaluation.latent_activations import Activations

N_BINS = 30
N_DECILES = 10
N_FIRES_ON = 8
"""Tokens that are named for each latent, those with the largest shares of its activation."""


class Centres(NamedTuple):
    """Positions of the activations that are shown of a latent, in the flattened text."""

    top: list[int]
    bottom: list[int]
    random: list[int]
    deciles: list[tuple[float, float, list[int]]]
    """The smallest and the largest activation of each tenth, and positions in it; the largest tenth comes first."""


class Entries(NamedTuple):
    """The activations of one latent, in the order of the text."""

    positions: Int[Tensor, " m"]
    values: Float[Tensor, " m"]


class LatentsOnText(Sequence[dict[str, Any]]):
    """Descriptions of latents, as `features.json` holds them. Contexts are cut from the text when one is asked for.

    So 50,000 latents with 20 contexts each take the memory of their positions.

    Args:
        activations: those of n latents.
        n_top: contexts with the most positive activations (`top`), and with the most negative ones (`bottom`).
        n_random: contexts drawn among the other activations.
        n_per_decile: contexts drawn from each tenth of the activations.
        context: tokens to show on either side.
    """

    def __init__(
        self, activations: Activations, n: int, *, n_top: int, n_random: int, context: int, n_per_decile: int = 0
    ):
        self.tokens, self.context = activations.tokens, context
        order = torch.argsort(activations.latents, stable=True)
        counts = torch.bincount(activations.latents, minlength=n).tolist()
        columns = activations.positions[order].split(counts), activations.values[order].split(counts)
        self.entries = [Entries(*entry) for entry in zip(*columns, strict=True)]
        generator = torch.Generator().manual_seed(0)
        self.facts = [describe_entries(entry, activations) for entry in self.entries]
        self.centres = [
            choose_centres(*entry, (n_top, n_random, n_per_decile), context, generator) for entry in self.entries
        ]

    def __len__(self) -> int:
        return len(self.entries)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        centres, entries = self.centres[i], self.entries[i]

        def cut(positions: list[int]) -> list[dict[str, Any]]:
            return [excerpt(self.tokens, c, self.context, entries) for c in positions]

        found = {name: cut(getattr(centres, name)) for name in ("top", "bottom", "random")}
        deciles = [{"from": low, "to": high, "contexts": cut(some)} for low, high, some in centres.deciles]
        return self.facts[i] | found | {"deciles": deciles}

    def shown_rows(self) -> Int[Tensor, " r"]:
        """Return the rows of the text in which a context lies, ascending."""
        shown = np.zeros(len(self.tokens), dtype=bool)
        for c in self.centres:
            for some in (c.top, c.bottom, c.random, *(positions for *_, positions in c.deciles)):
                shown[np.array(some, dtype=int) // self.tokens.shape[1]] = True
        return torch.from_numpy(shown.nonzero()[0])


def describe_entries(entries: Entries, activations: Activations) -> dict[str, Any]:
    """Describe a latent by numbers: density, range, histogram, and the tokens on which it fires."""
    values, m = entries.values, len(entries.values)
    return {
        "density": m / max(1, activations.n_positions),
        "max": max(0.0, float(values.max())) if m else 0.0,
        "min": min(0.0, float(values.min())) if m else 0.0,
        "histogram": histogram(values),
        "fires_on": fires_on(activations.tokens.flatten()[entries.positions], values),
    }


def fires_on(tokens: Int[Tensor, " m"], values: Float[Tensor, " m"]) -> list[dict[str, Any]]:
    """Return the tokens on which a latent fires: their shares of sum |activation|, the largest first, and how often."""
    ids, where = np.unique(tokens.numpy(), return_inverse=True)
    strength = np.bincount(where, weights=values.abs().numpy(), minlength=len(ids))
    counts, total = np.bincount(where, minlength=len(ids)), float(strength.sum())
    best = np.argsort(-strength, kind="stable")[:N_FIRES_ON]
    columns = (column[best].tolist() for column in (ids, strength / total, counts))
    return [{"token": i, "share": round(s, 4), "count": n} for i, s, n in zip(*columns, strict=True)]


def choose_centres(
    positions: Int[Tensor, " m"],
    values: Float[Tensor, " m"],
    sizes: tuple[int, int, int],
    context: int,
    generator: torch.Generator,
) -> Centres:
    """Choose the activations of a latent whose contexts are shown: n_top, n_random and n_per_decile of them."""
    n_top, n_random, n_per_decile = sizes
    up, down = (rank_contexts(positions, sign * values, context) for sign in (1, -1))
    rest = keep_one_per_window(torch.cat([up[n_top:], down[n_top:]]), context)
    drawn = rest[torch.randperm(len(rest), generator=generator)[:n_random]]
    deciles = []
    if n_per_decile and len(values):
        order = values.argsort(descending=True, stable=True)
        for part in order.tensor_split(min(N_DECILES, len(order))):
            some = part[torch.randperm(len(part), generator=generator)[:n_per_decile]]
            low, high = (round(float(values[i]), 4) for i in (part[-1], part[0]))
            deciles.append((low, high, positions[some].tolist()))
    return Centres(up[:n_top].tolist(), down[:n_top].tolist(), drawn.tolist(), deciles)


def rank_contexts(positions: Int[Tensor, " m"], values: Float[Tensor, " m"], context: int) -> Int[Tensor, " _"]:
    """Return the positions of positive values, the largest first, one in each window of the text."""
    order = values.argsort(descending=True, stable=True)
    return keep_one_per_window(positions[order[values[order] > 0]], context)


def keep_one_per_window(positions: Int[Tensor, " m"], context: int) -> Int[Tensor, " _"]:
    """Cut the text into windows of 2·context + 1 tokens and keep the first position given in each window."""
    cells = (positions // (2 * context + 1)).numpy()
    return positions[np.sort(np.unique(cells, return_index=True)[1])]


def excerpt(tokens: Int[Tensor, "n t"], centre: int, context: int, entries: Entries) -> dict[str, Any]:
    """Return the tokens around one position, within its row, with the latent's activation on each."""
    length = tokens.shape[1]
    start, column = centre - centre % length, centre % length
    first, last = start + max(0, column - context), start + min(length, column + context + 1)
    activations = [0.0] * (last - first)
    for i, value in entries_between(entries, first, last):
        activations[i - first] = value
    return {
        "tokens": tokens[start // length, first - start : last - start].tolist(),
        "activations": activations,
        "centre": centre - first,
    }


def entries_between(entries: Entries, first: int, last: int) -> list[tuple[int, float]]:
    """Return (position, activation) of the entries at first <= position < last."""
    low, high = torch.searchsorted(entries.positions, torch.tensor([first, last])).tolist()
    values = [round(value, 4) for value in entries.values[low:high].tolist()]
    return list(zip(entries.positions[low:high].tolist(), values, strict=True))


def histogram(values: Float[Tensor, " m"]) -> dict[str, Any]:
    """Count activations in equal bins from `bottom`, 0 or the most negative one, to `top`, the largest one or 0."""
    bottom, top = (min(0.0, float(values.min())), max(0.0, float(values.max()))) if len(values) else (0.0, 1.0)
    counts = np.histogram(values.numpy(), bins=N_BINS, range=(bottom, top))[0]
    return {"counts": counts.tolist(), "bottom": bottom, "top": top}
