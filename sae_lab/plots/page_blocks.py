"""The data of the feature page as blocks, so that a browser decodes only what it shows.

    meta        the SAE, and columns with one number for each latent: density, largest activation, ...
    tokens      token ids and their spellings
    text        the rows of the text in which a context lies, as int32
    search      for each latent, the tokens on which it fires and those that it promotes
    latents-0   all that is known of the first CHUNK latents; latents-1, ... of the next ones

A context is the position of its activation in `text`, and the latent's activations around it as offset, value, offset,
value, ...: a text that many contexts share is there once.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sae_lab.evaluation.latent_contexts import LatentsOnText, entries_between

CHUNK = 64
"""Latents in a block; the same in page/data.js."""
WIDE = 100
"""Tokens on either side of an activation for which the page holds the latent's others; the same in page/context.js."""
COLUMNS = ("latent", "density", "max", "min", "norm", "group", "class", "relative_norm")
SEARCHED = {"fires": ("fires_on", "share"), "promotes": ("promoted", "logit")}
LEAST_SHARE = 0.02
"""A latent is found by a token that makes up this share of its activation."""


def page_blocks(description: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each block."""
    latents = description["latents"]
    on_text: LatentsOnText = latents.on_text
    rows = on_text.shown_rows()
    meta = {name: value for name, value in description.items() if name not in ("latents", "tokens")}
    columns = {name: [short(fact[name]) for fact in latents.facts] for name in COLUMNS if name in latents.facts[0]}
    yield "meta", to_bytes(meta | {"columns": columns, "context": on_text.context, "row": on_text.tokens.shape[1]})
    yield "tokens", to_bytes({"ids": list(description["tokens"]), "text": list(description["tokens"].values())})
    yield "text", on_text.tokens[rows].numpy().astype("<i4").tobytes()
    yield "search", to_bytes({name: search_index(latents.facts, *keys) for name, keys in SEARCHED.items()})
    place = np.full(len(on_text.tokens), -1)
    place[rows.numpy()] = np.arange(len(rows))
    for start in range(0, len(latents), CHUNK):
        some = range(start, min(start + CHUNK, len(latents)))
        yield f"latents-{start // CHUNK}", to_bytes([latents.facts[i] | contexts_of(on_text, i, place) for i in some])


def search_index(facts: Sequence[dict[str, Any]], key: str, weight: str) -> dict[str, list[Any]]:
    """Return the tokens of each latent as one list, with how many each has; the weights decide the order of results."""
    several = [
        [part for part in fact.get(key, []) if weight != "share" or part[weight] >= LEAST_SHARE] for fact in facts
    ]
    return {
        "counts": [len(some) for some in several],
        "tokens": [part["token"] for some in several for part in some],
        "shares": [short(part[weight]) for some in several for part in some],
    }


def contexts_of(on_text: LatentsOnText, i: int, place: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return the contexts of a latent for the page. `place` is the index of a row of the text among those shown."""
    length, entries = on_text.tokens.shape[1], on_text.entries[i]

    def pack(positions: list[int]) -> list[Any]:
        packed = []
        for centre in positions:
            row, column = divmod(centre, length)
            first, last = max(row * length, centre - WIDE), min((row + 1) * length, centre + WIDE + 1)
            pairs = [x for at, value in entries_between(entries, first, last) for x in (at - centre, short(value))]
            packed.append([int(place[row]) * length + column, pairs])
        return packed

    centres = on_text.centres[i]
    found: dict[str, Any] = {name: pack(getattr(centres, name)) for name in ("top", "bottom", "random")}
    return found | {"deciles": [[low, high, pack(some)] for low, high, some in centres.deciles]}


def short(value: Any) -> Any:
    """Round a float to four significant digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def to_bytes(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
