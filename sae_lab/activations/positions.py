"""The positions of text rows on which an SAE is trained and evaluated, and the activations there."""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.exclusions import Exclusions, ShortRows, is_short, norm_limits
from sae_lab.activations.previous import has_previous
from sae_lab.activations.source import Source
from sae_lab.activations.workers import kept_activations
from sae_lab.lm.base import LanguageModel

log = logging.getLogger(__name__)


class Positions:
    """The positions of text rows that are kept: by token and place, and by the norms of a language model's activations.

    Args:
        lm: the language model, read at its sites.
        exclusions: what is left out for its token or its place.
        max_norm: leave out a row whose norm is more than so many times the median norm at any site (see is_short).
        probe_text: returns the text rows of the median norms: the same whatever the seed and the sizes.
        device: where the activations are used.
    """

    def __init__(
        self,
        lm: LanguageModel,
        exclusions: Exclusions,
        max_norm: float | None,
        probe_text: Callable[[], Int[Tensor, "n t"]],
        device: torch.device,
    ):
        self.lm, self.exclusions, self.max_norm = lm, exclusions, max_norm
        self.probe_text, self.device = probe_text, device

    def at(self, lm: LanguageModel) -> "Positions":
        """Return what the same settings leave at other sites."""
        return Positions(lm, self.exclusions, self.max_norm, self.probe_text, self.device)

    def settings(self) -> dict[str, Any]:
        """Return what decides which positions are kept, by the keys of `data`."""
        _, bos, first, tokens = self.exclusions
        left_out = {"exclude_bos": bos, "exclude_first": first, "exclude_tokens": list(tokens)}
        return left_out | {"max_norm": self.max_norm}

    @property
    def are_by_place_alone(self) -> bool:
        """Whether their place alone decides which positions are kept, so that every text row has as many."""
        _, bos, _, tokens = self.exclusions
        return not (bos or tokens or self.max_norm is not None)

    def mask(self, tokens: Int[Tensor, "n t"]) -> Bool[Tensor, "n t"]:
        """Return a mask of the positions that are not left out for their token or place; `max_norm` may leave fewer."""
        return self.exclusions.keep(tokens)

    def pair_mask(self, tokens: Int[Tensor, "n t"]) -> Bool[Tensor, "n t"]:
        """Return a mask of the positions that make pairs with the position before."""
        return has_previous(tokens, self.mask(tokens), self.lm.bos_id)

    def mask_with(self, tokens: Int[Tensor, "n t"], activations: Float[Tensor, "n t s d"]) -> Bool[Tensor, "n t"]:
        """Return a mask of the positions that are kept, of text whose activations are known."""
        keep = self.mask(tokens)
        return keep if self.max_norm is None else keep & self._is_short(activations).to(keep.device)

    def read(self, tokens: Int[Tensor, "n t"]) -> tuple[Bool[Tensor, "n t"], Float[Tensor, "m s d"]]:
        """Return a mask of the positions that are kept, and the activations there.

        Raises:
            UserError: they are not finite.
        """
        keep = self.mask(tokens)
        rows = kept_activations(self.lm, tokens, keep)
        if self.max_norm is not None:
            short = self._is_short(rows)
            keep, rows = keep.masked_scatter(keep, short.to(keep.device)), rows[short]
        return keep, rows.to(self.device)

    def activations(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "m s d"]:
        """Return the activations at the positions that are kept."""
        return self.read(tokens)[1]

    def without_long(self, source: Source) -> Source:
        """Return the source without the rows that `max_norm` leaves out."""
        return source if self.max_norm is None else ShortRows(source, self._is_short)

    def _is_short(self, rows: Float[Tensor, "*n s d"]) -> Bool[Tensor, "*n"]:
        limits = [self.limits[site] for site in self.lm.sites]
        return is_short(rows, limits * (rows.shape[-2] // len(limits)))  # a pair has the sites twice

    @cached_property
    def limits(self) -> dict[str, float]:
        """The largest norm of a row to keep, by site; empty without `max_norm`. Part of the state of a run or a cache.

        The median is that of the probe text, one text row after the other, so no size of a pass or a block changes it.
        """
        if self.max_norm is None:
            return {}
        rows = [kept_activations(self.lm, row, self.mask(row)) for row in self.probe_text().split(1)]
        return norm_limits(torch.cat(rows), self.lm.sites, self.max_norm)

    def log_left_out(self) -> None:
        """Log the share of the probe text that each key leaves out; of max_norm, of what the others leave."""
        tokens = self.probe_text()
        shares = {f"data.{key}": mask.float().mean().item() for key, mask in self.exclusions.masks(tokens).items()}
        if self.max_norm is not None:
            kept = sum(int(self.read(row)[0].sum()) for row in tokens.split(1))
            shares["data.max_norm"] = 1 - kept / max(1, int(self.mask(tokens).sum()))
        shown = ", ".join(f"{key} {share:.2%}" for key, share in shares.items() if share)
        log.info("Left out of %s held-out tokens: %s.", f"{tokens.numel():,}", shown or "none")
