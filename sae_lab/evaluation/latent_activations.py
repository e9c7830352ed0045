"""Gather what chosen latents do on a text: one entry for each active (token, latent) pair."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.data import ActivationData
from sae_lab.ops.sparse import Code, SparseCode
from sae_lab.runtime.screen import track
from sae_lab.saes.base import BaseSAE


class Activations(NamedTuple):
    """Activations of the chosen latents over a text, with one entry for each active (token, latent) pair.

    Entries are in the order of the text.
    """

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
    sites: Int[Tensor, " m"] | None = None
    """Index of the site that explains the entry's row, for an SAE that chooses one for each row."""


@torch.no_grad()
def gather_activations(sae: BaseSAE, data: ActivationData, latents: Int[Tensor, " c"], n_tokens: int) -> Activations:
    """Gather all activations of `latents` on the first n_tokens of the training text, under the deployed rule."""
    rows = data.text.first_rows(max(1, n_tokens // data.seq_len))
    return activations_on(sae, data, rows, latents, "reading")


@torch.no_grad()
def activations_on(
    sae: BaseSAE, data: ActivationData, rows: Int[Tensor, "n t"], latents: Int[Tensor, " c"], doing: str = ""
) -> Activations:
    """Gather all activations of `latents` on rows of tokens, under the deployed rule.

    Args:
        doing: what a progress bar says; no bar if it is empty.
    """
    place = torch.full((sae.n_latents,), -1)
    place[latents] = torch.arange(len(latents))
    parts, n_positions = [], 0
    passes = rows.split(data.lm_batch_rows)
    for start, tokens in with_offsets(track(passes, doing) if doing else passes):
        keep, x = data.positions.read(tokens)
        keep = keep.flatten()
        row, latent, value = active_entries(sae.autoencode(x)[1])
        chosen = place[latent] >= 0
        row = row[chosen]
        positions = start + keep.nonzero().squeeze(-1).cpu()[row]
        parts.append((place[latent[chosen]], positions, value[chosen].float(), chosen_sites(sae, x)[row]))
        n_positions += int(keep.sum())
    found, positions, values, sites = (torch.cat(column) for column in zip(*parts, strict=True))
    return Activations(rows, n_positions, found, positions, values, None if bool((sites < 0).any()) else sites)


def chosen_sites(sae: BaseSAE, x: Float[Tensor, "b s d"]) -> Int[Tensor, " b"]:
    """Return the index of the one site of each row that the SAE predicts; -1 where it predicts another number."""
    mask = sae.predicted_mask(x)
    if mask is None or sae.n_inputs:
        return torch.full((len(x),), -1)
    return torch.where(mask.sum(dim=-1) == 1, mask.float().argmax(dim=-1), -1).cpu()


def with_offsets(batches) -> Iterator[tuple[int, Tensor]]:
    """Yield each batch of text rows with the number of tokens before it."""
    start = 0
    for tokens in batches:
        yield start, tokens
        start += tokens.numel()


def active_entries(code: Code) -> tuple[Tensor, Tensor, Tensor]:
    """Return (row, latent, value) of all active entries, on the CPU, row by row."""
    if isinstance(code, SparseCode):
        return code.pattern.rows.cpu(), code.latents.cpu(), code.values.cpu()
    rows, latents = code.nonzero(as_tuple=True)
    return rows.cpu(), latents.cpu(), code[rows, latents].cpu()
