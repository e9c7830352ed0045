"""Describe latents by their weights: what they read and write, their nearest neighbours, and their place in the SAE."""

from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.evaluation.diffing import class_of, relative_norm
from sae_lab.lm.base import LanguageModel
from sae_lab.saes.base import BaseSAE


@torch.no_grad()
def describe_directions(
    sae: BaseSAE, lm: LanguageModel, latents: Int[Tensor, " c"], n_logits: int, n_neighbours: int
) -> list[dict[str, Any]]:
    """Describe each latent's decoder row: the tokens that it promotes and suppresses, and its nearest neighbours.

    Logits are the row times the unembedding, minus their mean over the vocabulary. They are left out if the widths of
    site and unembedding differ. Neighbours are the latents with the largest cosine similarity of decoder rows; its
    absolute value counts where codes are signed.
    """
    directions = sae.directions().float().flatten(1)
    rows, norms = F.normalize(directions, dim=-1), directions.norm(dim=-1)
    unembedding = lm.unembedding()
    found = []
    for chunk in latents.to(rows.device).split(256):
        row: list[dict[str, Any]] = [{"norm": round(norm, 5)} for norm in norms[chunk].tolist()]
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
                for i, tokens in enumerate(strongest_tokens(sign * logits, n_logits, "logit", sign)):
                    row[i][name] = tokens
        found += row
    return found


def strongest_tokens(scores: Float[Tensor, "c v"], n: int, name: str, sign: int = 1) -> list[list[dict[str, Any]]]:
    """Return the n tokens of largest score in each row, with sign · score under `name`."""
    top = scores.topk(min(n, scores.shape[1]))
    both = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    return [[{"token": t, name: round(sign * v, 3)} for t, v in zip(ids, values, strict=True)] for values, ids in both]


@torch.no_grad()
def describe_reading(sae: BaseSAE, lm: LanguageModel, latents: Int[Tensor, " c"], n: int) -> list[dict[str, Any]]:
    """Describe what each latent of a transcoder reads: the tokens whose embeddings its encoder row is most similar to.

    `reads` holds the cosines with the embeddings minus their mean. It is left out for other SAEs, since their decoder
    rows say it, and where the encoder's width is not the embedding's.
    """
    rows = sae.reading_directions() if sae.n_inputs else None
    embedding = None if rows is None else lm.embedding()
    if rows is None or embedding is None or rows.flatten(1).shape[1] != embedding.shape[1]:
        return [{} for _ in latents]
    tokens = embedding.to(rows).float()
    tokens = F.normalize(tokens - tokens.mean(dim=0), dim=-1)
    found = []
    for chunk in latents.to(rows.device).split(256):
        cosines = F.normalize(rows[chunk].flatten(1).float(), dim=-1) @ tokens.T
        found += [{"reads": some} for some in strongest_tokens(cosines, n, "cosine")]
    return found


@torch.no_grad()
def describe_places(sae: BaseSAE, lm: LanguageModel, latents: Int[Tensor, " c"]) -> list[dict[str, Any]]:
    """Describe the place of each latent in the SAE, as far as there is something to say.

    `threshold`: what its activation must exceed. `group`: the index of its group (see `latent_groups`). `writes`: the
    norm of its decoder row at each of several sites. `relative_norm` and `class`: to which of two models it belongs
    (see diffing.py).
    """
    columns: dict[str, list[Any]] = {}
    if (thresholds := sae.activation_thresholds()) is not None:
        columns["threshold"] = [round(t, 5) for t in thresholds[latents.to(thresholds.device)].tolist()]
    if (groups := sae.latent_groups()) is not None:
        ends = [*accumulate(groups[1])]
        columns["group"] = np.searchsorted(ends, latents.cpu().numpy(), side="right").tolist()
    directions = sae.directions().float()
    directions = directions[latents.to(directions.device)]
    if directions.shape[1] > 1 and not is_routed(sae):
        columns["writes"] = [[round(n, 4) for n in norms] for norms in directions.norm(dim=-1).tolist()]
    if lm.models and not sae.n_inputs:
        columns["relative_norm"] = [round(r, 4) for r in relative_norm(directions).tolist()]
        columns["class"] = [class_of(r) for r in columns["relative_norm"]]
    return [{name: column[i] for name, column in columns.items()} for i in range(len(latents))]


def is_routed(sae: BaseSAE) -> bool:
    """Return whether the SAE explains one site of each row, so that its latents write the same at all sites."""
    x = torch.randn(2, sae.n_sources, sae.d_in, generator=torch.Generator().manual_seed(0))
    mask = sae.predicted_mask(x.to(next(sae.parameters()).device))
    return mask is not None and not sae.n_inputs
