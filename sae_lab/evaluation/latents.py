"""Descriptions of latents: the contexts in which they are active, and what their weights read and write."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from jaxtyping import Int
from torch import Tensor

from sae_lab.activations.data import ActivationData
from sae_lab.evaluation.cofiring import describe_cofiring
from sae_lab.evaluation.latent_activations import Activations, gather_activations
from sae_lab.evaluation.latent_contexts import LatentsOnText
from sae_lab.evaluation.latent_directions import describe_directions, describe_places, describe_reading
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.text.spelling import spell

SCHEMA = 2
"""Version of features.json. 2 adds keys to the one before, which had no version; it changes none."""
OF_TOKENS = ("fires_on", "promoted", "suppressed", "reads")


class Latents(Sequence[dict[str, Any]]):
    """The described latents, as dicts. Each is put together when it is asked for (see LatentsOnText).

    Attributes:
        facts: what is known of each latent without its contexts.
    """

    def __init__(self, facts: Sequence[dict[str, Any]], on_text: LatentsOnText):
        self.on_text = on_text
        self.facts = [fact | mine for fact, mine in zip(facts, on_text.facts, strict=True)]

    def __len__(self) -> int:
        return len(self.facts)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, i: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, i: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return [self[j] for j in range(len(self))[i]] if isinstance(i, slice) else self.facts[i] | self.on_text[i]


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
    n_per_decile: int = 1,
) -> dict[str, Any]:
    """Describe the chosen latents: what they respond to in the training text and what their directions promote.

    Args:
        latents: their numbers, ascending.
        n_tokens: tokens of the text to read.
        n_top, n_random: contexts of the strongest activations (of signed codes: as many for either sign), and of
            activations drawn at random.
        context: tokens on either side of an activation.
        n_logits: tokens that a direction promotes and suppresses most.
        n_neighbours: latents with the most similar directions, and latents that fire on the same tokens.
        n_per_decile: contexts drawn from each tenth of a latent's activations.
    """
    activations = gather_activations(sae, data, latents, n_tokens)
    sizes = {"n_top": n_top, "n_random": n_random, "n_per_decile": n_per_decile, "context": context}
    on_text = LatentsOnText(activations, len(latents), **sizes)
    columns = (
        describe_places(sae, data.lm, latents),
        describe_directions(sae, data.lm, latents, n_logits, n_neighbours),
        describe_reading(sae, data.lm, latents, n_logits),
        describe_partners(activations, latents, n_neighbours),
        describe_routing(activations, len(latents), sae.n_sources),
    )
    facts = [merge({"latent": i}, *parts) for i, *parts in zip(latents.tolist(), *columns, strict=True)]
    found = Latents(facts, on_text)
    return describe_sae(sae, data) | {
        "n_tokens": activations.n_positions,
        "tokens": spell_tokens(data.lm.tokenizer, found),
        "latents": found,
    }


def describe_sae(sae: BaseSAE, data: ActivationData) -> dict[str, Any]:
    """Describe what all latents have in common: the SAE, the language model and the sites."""
    groups = sae.latent_groups()
    return {
        "schema": SCHEMA,
        "sae": type(sae).__name__ + (" with signed codes" if sae.signed else ""),
        "n_latents": sae.n_latents,
        "lm": data.lm.name,
        "models": list(data.lm.models),
        "sites": list(data.lm.sites),
        "n_inputs": sae.n_inputs,
        "groups": None if groups is None else {"name": groups[0], "sizes": list(groups[1])},
    }


def merge(*parts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def describe_partners(activations: Activations, latents: Int[Tensor, " c"], n_most: int) -> list[dict[str, Any]]:
    """Return `cofiring` of each latent, with the latents' own numbers (see cofiring.py)."""
    numbers = latents.tolist()
    found = describe_cofiring(activations, len(numbers), n_most)
    return [{"cofiring": [other | {"latent": numbers[other["latent"]]} for other in some]} for some in found]


def describe_routing(activations: Activations, n: int, n_sites: int) -> list[dict[str, Any]]:
    """Return `routed` of each latent: the share of its activations at each site; left out if no site is chosen."""
    if activations.sites is None:
        return [{} for _ in range(n)]
    counts = torch.bincount(activations.latents * n_sites + activations.sites, minlength=n * n_sites).view(n, n_sites)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    return [{"routed": [round(share, 4) for share in row]} for row in shares.tolist()]


def choose_latents(sae: BaseSAE, latents: Any, n_latents: int) -> Int[Tensor, " c"]:
    """Return the latents to describe, ascending: those of `latents`, or n_latents drawn from all.

    Args:
        latents: a list of numbers, one number, or text with numbers and ranges, such as "17, 20-25"; None: drawn.

    Raises:
        UserError: `latents` holds anything but latent indices.
    """
    if latents is None:
        drawn = torch.randperm(sae.n_latents, generator=torch.Generator().manual_seed(0))[:n_latents]
        return drawn.sort().values
    last, given = sae.n_latents - 1, [latents] if isinstance(latents, int) else latents
    ends = numbers_and_ranges(given) if isinstance(given, str) else given
    named = isinstance(ends, Sequence) and all(type(i) is int and 0 <= i <= last for i in flat(ends))
    if not named or not ends:
        raise UserError(
            f"latents={latents} must be numbers between 0 and {last}, such as latents=[0,{last}], or ranges of them, "
            f"such as latents=0-{last}."
        )
    chosen = [range(i[0], i[1] + 1) if isinstance(i, tuple) else [i] for i in ends]
    return torch.tensor(sorted({i for part in chosen for i in part}))


def numbers_and_ranges(text: str) -> list[tuple[int, int]] | None:
    """Return the first and the last number of each part of "17, 20-25"; None if a part is neither."""
    found = [re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part) for part in text.split(",")]
    ends = [(int(part[1]), int(part[2] or part[1])) for part in found if part]
    return ends if len(ends) == len(found) and all(a <= b for a, b in ends) else None


def flat(ends: Iterable[Any]) -> Iterable[Any]:
    """Return numbers, and the ends of ranges."""
    return (i for part in ends for i in (part if isinstance(part, tuple) else (part,)))


def spell_tokens(tokenizer: Any, found: Latents) -> dict[int, str]:
    """Spell every token id in the descriptions, and in the rows of the text from which contexts are cut."""
    rows = found.on_text.tokens[found.on_text.shown_rows()]
    of_weights = (part["token"] for fact in found.facts for name in OF_TOKENS for part in fact.get(name, []))
    return spell_ids(tokenizer, [*rows.unique().tolist(), *of_weights])


def spell_ids(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Spell token ids, ascending and each once."""
    return {i: spell(tokenizer, i) for i in sorted(set(ids))}
