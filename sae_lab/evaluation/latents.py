"""Descriptions of latents: the contexts in which they are active, and the tokens that they promote."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.data import ActivationData
from sae_lab.lm.base import LanguageModel
from sae_lab.ops.sparse import Code, SparseCode
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.screen import track
from sae_lab.saes.base import BaseSAE
from sae_lab.text.spelling import spell

N_BINS = 30


class Activations(NamedTuple):
    """Activations of the chosen latents over a text, with one entry for each active (token, latent) pair."""

    tokens: Int[Tensor, "n t"]
    """The text in rows."""
    n_positions: int
    """Positions of the text that the SAE reads (`data.exclude_*` leaves some out)."""
    latents: Int[Tensor, " m"]
    """Index of the entry's latent among the chosen ones."""
    positions: Int[Tensor, " m"]
    """Position of the entry's token in the flattened text."""
    values: Float[Tensor, " m"]
    """Activation of the entry."""


def describe_latents(
    sae: BaseSAE,
    data: ActivationData,
    latents: Int[Tensor, " c"],
    *,
    n_tokens: int,
    n_top: int,
    n_random: int,
    context: int,
    n_logits: int,
    n_neighbours: int,
) -> dict[str, Any]:
    """Describe the chosen latents: what they respond to in the training text and what their directions promote.

    Args:
        latents: their numbers, ascending.
        n_tokens: tokens of the text to read.
        n_top, n_random: contexts of the strongest activations (of signed codes: as many for either sign), and of
            activations drawn at random.
        context: tokens on either side of an activation.
        n_logits: tokens that a direction promotes and suppresses most.
        n_neighbours: latents with the most similar directions.
    """
    activations = gather_activations(sae, data, latents, n_tokens)
    found = describe_activations(activations, len(latents), n_top=n_top, n_random=n_random, context=context)
    meanings = describe_directions(sae, data.lm, latents, n_logits, n_neighbours)
    found = [{"latent": i} | a | b for i, a, b in zip(latents.tolist(), found, meanings, strict=True)]
    return {
        "sae": type(sae).__name__ + (" with signed codes" if sae.signed else ""),
        "n_latents": sae.n_latents,
        "lm": data.lm.name,
        "sites": list(data.lm.sites),
        "n_tokens": activations.n_positions,
        "tokens": spell_tokens(data.lm.tokenizer, found),
        "latents": found,
    }


@torch.no_grad()
def gather_activations(sae: BaseSAE, data: ActivationData, latents: Int[Tensor, " c"], n_tokens: int) -> Activations:
    """Gather all activations of `latents` on the first n_tokens of the training text, under the deployed rule."""
    rows = data.text.first_rows(max(1, n_tokens // data.seq_len))
    place = torch.full((sae.n_latents,), -1)
    place[latents] = torch.arange(len(latents))
    parts, n_positions = [], 0
    for start, tokens in with_offsets(track(rows.split(data.lm_batch_rows), "reading")):
        keep, x = data.kept(tokens)
        keep = keep.flatten()
        row, latent, value = active_entries(sae.autoencode(x)[1])
        chosen = place[latent] >= 0
        positions = start + keep.nonzero().squeeze(-1)[row[chosen]]
        parts.append((place[latent[chosen]], positions, value[chosen].float()))
        n_positions += int(keep.sum())
    return Activations(rows, n_positions, *(torch.cat(column) for column in zip(*parts, strict=True)))


def with_offsets(batches) -> Iterator[tuple[int, Tensor]]:
    """Yield each batch of text rows with the number of tokens before it."""
    start = 0
    for tokens in batches:
        yield start, tokens
        start += tokens.numel()


def active_entries(code: Code) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row, latent, value) of all active entries, on the CPU."""
    if isinstance(code, SparseCode):
        return code.pattern.rows.cpu(), code.latents.cpu(), code.values.cpu()
    rows, latents = code.nonzero(as_tuple=True)
    return rows.cpu(), latents.cpu(), code[rows, latents].cpu()


def describe_activations(
    activations: Activations, n: int, *, n_top: int, n_random: int, context: int, seed: int = 0
) -> list[dict[str, Any]]:
    """Describe each of the n chosen latents: density, range of activations, histogram and contexts.

    Args:
        n_top: contexts with the most positive activations (`top`), and with the most negative ones (`bottom`).
        n_random: contexts drawn among the other activations.
        context: tokens to show on either side.
    """
    order = torch.argsort(activations.latents, stable=True)
    counts = torch.bincount(activations.latents, minlength=n).tolist()
    generator = torch.Generator().manual_seed(seed)
    described = []
    for mine in order.split(counts):
        values, positions = activations.values[mine], activations.positions[mine]
        row: dict[str, Any] = {
            "density": len(mine) / max(1, activations.n_positions),
            "max": max(0.0, float(values.max())) if len(mine) else 0.0,
            "min": min(0.0, float(values.min())) if len(mine) else 0.0,
        }
        up, down = (rank_contexts(positions, sign * values, context) for sign in (1, -1))
        rest = keep_one_per_window(torch.cat([up[n_top:], down[n_top:]]), context)
        drawn = rest[torch.randperm(len(rest), generator=generator)[:n_random]]
        strengths = dict(zip(positions.tolist(), values.tolist(), strict=True))
        row["histogram"] = histogram(values)
        for name, centres in (("top", up[:n_top]), ("bottom", down[:n_top]), ("random", drawn)):
            row[name] = [excerpt(activations.tokens, c, context, strengths) for c in centres.tolist()]
        described.append(row)
    return described


def rank_contexts(positions: Int[Tensor, " m"], values: Float[Tensor, " m"], context: int) -> Int[Tensor, " _"]:
    """Return the positions of positive values, the largest first, one in each window of the text."""
    order = values.argsort(descending=True, stable=True)
    return keep_one_per_window(positions[order[values[order] > 0]], context)


def keep_one_per_window(positions: Int[Tensor, " m"], context: int) -> Int[Tensor, " _"]:
    """Cut the text into windows of 2·context + 1 tokens and keep the first position given in each window."""
    cells = (positions // (2 * context + 1)).numpy()
    return positions[np.sort(np.unique(cells, return_index=True)[1])]


def excerpt(tokens: Int[Tensor, "n t"], centre: int, context: int, strengths: dict[int, float]) -> dict[str, Any]:
    """Return the tokens around one position, within its row, with the latent's activation on each."""
    length = tokens.shape[1]
    start, column = centre - centre % length, centre % length
    window = range(start + max(0, column - context), start + min(length, column + context + 1))
    return {
        "tokens": tokens.flatten()[window.start : window.stop].tolist(),
        "activations": [round(strengths.get(i, 0.0), 4) for i in window],
        "centre": centre - window.start,
    }


def histogram(values: Float[Tensor, " m"]) -> dict[str, Any]:
    """Count activations in equal bins from `bottom`, 0 or the most negative one, to `top`, the largest one or 0."""
    bottom, top = (min(0.0, float(values.min())), max(0.0, float(values.max()))) if len(values) else (0.0, 1.0)
    counts = np.histogram(values.numpy(), bins=N_BINS, range=(bottom, top))[0]
    return {"counts": counts.tolist(), "bottom": bottom, "top": top}


@torch.no_grad()
def describe_directions(
    sae: BaseSAE, lm: LanguageModel, latents: Int[Tensor, " c"], n_logits: int, n_neighbours: int
) -> list[dict[str, Any]]:
    """Describe each latent's decoder row: the tokens that it promotes and suppresses, and its nearest neighbours.

    Logits are the row times the unembedding, minus their mean over the vocabulary. They are left out if the widths of
    site and unembedding differ. Neighbours are the latents with the largest cosine similarity of decoder rows; its
    absolute value counts where codes are signed.
    """
    rows = F.normalize(sae.directions().float().flatten(1), dim=-1)
    unembedding = lm.unembedding()
    found = []
    for chunk in latents.to(rows.device).split(256):
        row: list[dict[str, Any]] = [{} for _ in chunk]
        similarity = rows[chunk] @ rows.T
        closeness = similarity.abs() if sae.signed else similarity.clone()
        closeness[torch.arange(len(chunk)), chunk] = -torch.inf
        near = closeness.topk(min(n_neighbours, len(rows) - 1)).indices
        for i, (cosines, others) in enumerate(zip(similarity.gather(1, near).tolist(), near.tolist(), strict=True)):
            row[i]["neighbours"] = [{"latent": o, "cosine": round(c, 3)} for o, c in zip(others, cosines, strict=True)]
        if unembedding is not None and unembedding.shape[1] == rows.shape[1]:
            logits = rows[chunk] @ unembedding.to(rows).T
            logits -= logits.mean(dim=-1, keepdim=True)
            for name, sign in (("promoted", 1), ("suppressed", -1)):
                top = (sign * logits).topk(min(n_logits, logits.shape[1]))
                for i, (values, ids) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
                    row[i][name] = [{"token": t, "logit": round(sign * v, 3)} for t, v in zip(ids, values, strict=True)]
        found += row
    return found


def choose_latents(sae: BaseSAE, latents: Any, n_latents: int) -> Int[Tensor, " c"]:
    """Return the latents to describe, ascending: those in the list `latents`, or n_latents drawn from all.

    Raises:
        UserError: `latents` is not a list of latent indices.
    """
    if latents is None:
        drawn = torch.randperm(sae.n_latents, generator=torch.Generator().manual_seed(0))[:n_latents]
        return drawn.sort().values
    named = isinstance(latents, Sequence) and all(isinstance(i, int) and 0 <= i < sae.n_latents for i in latents)
    if not named or not latents:
        last = sae.n_latents - 1
        raise UserError(f"latents={latents} must be a list of numbers between 0 and {last}, such as [0,{last}].")
    return torch.tensor(sorted(set(latents)))


def spell_tokens(tokenizer: Any, found: list[dict[str, Any]]) -> dict[int, str]:
    """Spell every token id in the descriptions."""
    ids = {t for row in found for name in ("top", "bottom", "random") for e in row[name] for t in e["tokens"]}
    ids |= {p["token"] for row in found for name in ("promoted", "suppressed") for p in row.get(name, [])}
    return {i: spell(tokenizer, i) for i in sorted(ids)}
