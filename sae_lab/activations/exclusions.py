"""Which positions are left out of training and evaluation: by token, by place, by the norm of activations."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.source import Chunk, Source
from sae_lab.runtime.errors import SettingError


class Exclusions(NamedTuple):
    """Positions that are left out because of their token or their place in the row.

    Args:
        bos_id: the token that `bos` leaves out.
        bos: leave out every BOS token.
        first: leave out the first n positions of each row.
        tokens: ids to leave out wherever they stand.
    """

    bos_id: int | None
    bos: bool
    first: int
    tokens: tuple[int, ...] = ()

    def masks(self, tokens: Int[Tensor, "n t"]) -> dict[str, Bool[Tensor, "n t"]]:
        """Return by key of data which positions it leaves out."""
        found = {
            "exclude_first": (torch.arange(tokens.shape[1], device=tokens.device) < self.first).expand(tokens.shape)
        }
        if self.bos:
            found["exclude_bos"] = tokens.eq(-1 if self.bos_id is None else self.bos_id)
        if self.tokens:
            found["exclude_tokens"] = torch.isin(tokens, torch.tensor(self.tokens, device=tokens.device))
        return found

    def keep(self, tokens: Int[Tensor, "n t"]) -> Bool[Tensor, "n t"]:
        """Return a mask of the positions that are left."""
        return ~torch.stack(list(self.masks(tokens).values())).any(dim=0)


def token_ids(tokenizer: Any, tokens: Sequence[int | str]) -> tuple[int, ...]:
    """Return the ids of tokens given as ids or as strings, sorted.

    Raises:
        SettingError: a string is not one token of the tokenizer, or no token has that id.
    """
    return tuple(sorted({token_id(tokenizer, token) for token in tokens}))


def token_id(tokenizer: Any, token: int | str) -> int:
    if isinstance(token, str):
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise SettingError(
                f"{{exclude_tokens}} has {token!r}, which is {len(ids)} tokens of this tokenizer ({ids}): "
                "give strings that are one token, or ids."
            )
        return ids[0]
    if token < 0 or (hasattr(tokenizer, "__len__") and token >= len(tokenizer)):
        raise SettingError(f"{{exclude_tokens}} has {token}, which is no id of this tokenizer: give another id.")
    return token


def norms(rows: Float[Tensor, "*n s d"]) -> Float[Tensor, "*n s"]:
    """Return the length of each activation, in float32."""
    return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)


def is_short(rows: Float[Tensor, "*n s d"], limits: Sequence[float]) -> Bool[Tensor, "*n"]:
    """Return which rows are not too long, as attention sinks and other massive activations are.

        row x is kept  ⇔  ‖x_s‖ ≤ limit_s at every site s          limit_s = max_norm · median ‖x_s‖

    A row is left out at all sites if it is too long at one. dictionary_learning's buffer has the same rule, with 10.
    """
    return (norms(rows) <= torch.tensor(limits, device=rows.device)).all(dim=-1)


def norm_limits(rows: Float[Tensor, "n s d"], sites: Sequence[str], max_norm: float) -> dict[str, float]:
    """Return the limits by site; of an even number of rows, the lower of the two middle norms is the median."""
    medians = norms(rows).median(dim=0).values
    return dict(zip(sites, (max_norm * medians.double()).tolist(), strict=True))


class ShortRows:
    """A Source without the rows of another Source that are too long. A rank filters the rows that it computes."""

    def __init__(self, source: Source, is_short: Callable[[Tensor], Tensor]):
        self.source, self.is_short = source, is_short

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state)

    def __iter__(self) -> Generator[Chunk, None, None]:
        chunks = iter(self.source)
        try:
            for chunk in chunks:
                yield chunk if chunk.rows.is_meta else chunk._replace(rows=chunk.rows[self.is_short(chunk.rows)])
        finally:
            chunks.close()
