"""Which latents fire on a text that somebody typed."""

from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import Int
from torch import Tensor

from sae_lab.activations.data import ActivationData
from sae_lab.evaluation.latent_activations import activations_on
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.text.encoding import Encoder
from sae_lab.text.spelling import spell

MOST_TOKENS = 20_000


def describe_text(sae: BaseSAE, data: ActivationData, text: str, n_latents: int = 100) -> dict[str, Any]:
    """Describe which latents fire on `text`, under the deployed rule.

    The text is cut into rows of seq_len tokens, each behind a BOS, as training text is. What looks like a special token
    is plain text.

    Args:
        n_latents: latents to return, those of largest |activation|.

    Returns:
        `tokens`: their spellings; `read`: whether the SAE reads the token (`data.exclude_*` leaves some out);
        `n_active`: how many latents fire; `latents`: the strongest ones, each with `latent`, `max` (its activation of
        largest absolute value) and `values` ([index of token, activation]).

    Raises:
        UserError: the text has no tokens, too many, or none that the SAE reads.
    """
    [ids] = Encoder(data.lm.tokenizer)([text])
    if not 0 < len(ids) <= MOST_TOKENS:
        raise UserError(f"text has {len(ids):,} tokens and must have 1 to {MOST_TOKENS:,}: change it.")
    tokens, where = rows_of(torch.from_numpy(ids.astype(np.int64)), data.seq_len, data.lm.bos_id)
    read = torch.cat([data.positions.read(part)[0] for part in tokens.split(data.lm_batch_rows)]).flatten()[where]
    if not read.any():
        raise UserError(
            f"text has {len(ids)} tokens, of which the SAE reads none (data.exclude_first leaves out the first ones of "
            "a row): give a longer text."
        )
    found = activations_on(sae, data, tokens, torch.arange(sae.n_latents))
    place = torch.full((tokens.numel(),), -1)
    place[where] = torch.arange(len(where))
    entries: dict[int, list[list[float]]] = {}
    columns = found.latents.tolist(), place[found.positions].tolist(), found.values.tolist()
    for latent, i, value in zip(*columns, strict=True):
        if i >= 0:  # else a BOS
            entries.setdefault(latent, []).append([i, round(value, 4)])
    peaks = {latent: max((value for _, value in some), key=abs) for latent, some in entries.items()}
    order = sorted(peaks, key=lambda latent: -abs(peaks[latent]))[:n_latents]
    return {
        "tokens": [spell(data.lm.tokenizer, i) for i in ids.tolist()],
        "read": read.tolist(),
        "n_active": len(peaks),
        "latents": [{"latent": i, "max": peaks[i], "values": entries[i]} for i in order],
    }


def rows_of(ids: Int[Tensor, " n"], seq_len: int, bos_id: int) -> tuple[Int[Tensor, "r t"], Int[Tensor, " n"]]:
    """Cut token ids into rows that begin with BOS and have equal lengths; the last one is filled up with BOS.

    Returns:
        The rows, and the place of each id in the flattened rows.
    """
    length = min(seq_len, len(ids) + 1)
    n_rows = -(-len(ids) // (length - 1))
    rows = torch.full((n_rows, length), bos_id)
    places = torch.arange(n_rows * length).view(n_rows, length)[:, 1:].flatten()[: len(ids)]
    rows.view(-1)[places] = ids
    return rows, places


def name_of_text(text: str) -> str:
    """Return the end of the name of files about a text."""
    return f"_text-{xxhash.xxh3_64_hexdigest(text.encode())[:8]}"
