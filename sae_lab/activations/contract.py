"""The contract of rows of activations: what they are, where they come from, and which of them are held out."""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from sae_lab.activations.held_out import HeldOut
from sae_lab.activations.interleave import InterleavedSource
from sae_lab.activations.prefetch import PrefetchedSource
from sae_lab.activations.source import Source
from sae_lab.runtime.errors import UserError


class ActivationRows(ABC):
    """Rows of activations `(n, s, d)`, of which StreamData makes batches. A subclass says how to get them."""

    name: str
    """Where the activations come from, for the log: a language model, a file."""
    sites: tuple[str, ...]
    """The names of the s sources."""
    d_in: int
    dtype: torch.dtype
    models: tuple[str, ...] = ()
    """The two models, for model diffing."""
    float32_forward_in_thread = False
    """Whether a thread computes float32 products of a language model during training steps."""

    @property
    def n_sources(self) -> int:
        return len(self.sites)

    @property
    def bytes_per_token(self) -> int:
        return self.n_sources * self.d_in * self.dtype.itemsize

    @abstractmethod
    def source(self) -> Source:
        """Return the training activations before shuffling, from the beginning."""

    @abstractmethod
    def read_ahead(self, source: Any) -> InterleavedSource | PrefetchedSource:
        """Return the source in the form that computes chunks ahead."""

    def keep_short(self, source: Source) -> Source:
        """Return the source without rows that are too long. By default none is, whatever its norm."""
        return source

    @abstractmethod
    def held_out(self, n_tokens: int) -> HeldOut:
        """Return the first held-out data, n_tokens in all, in parts of about a batch; always the same ones."""

    @abstractmethod
    def probe_rows(self, n: int = 16) -> Float[Tensor, "n s d"]:
        """Return n held-out activations, on which a saved SAE is verified."""

    @abstractmethod
    def origin(self) -> dict[str, Any]:
        """Return `model` (name, revision), `sites`, `tokenizer` and `bos` for the provenance of an SAE.

        `reading`, if there is one, is how documents that are no plain text became ids (see TextSource).
        """

    @cached_property
    @abstractmethod
    def source_digests(self) -> dict[str, str]:
        """Digests of what determines the batches besides the config; they must be the same when a run resumes."""

    def digests_like(self, origin: dict[str, str]) -> dict[str, str]:
        """Return the digests to compare with those that a run began with."""
        return self.source_digests

    def shares_rows_with(self, other: Self) -> bool:
        """Return whether one pass gives the rows of both, at sites that may differ."""
        return True

    def with_previous(self) -> Self:
        """Return the same data with training batches (b, 2·s, d): each row, then that of the token before it.

        Tokens without one in their document are left out. Everything held out stays (b, s, d).

        Raises:
            UserError: the rows are not in the order of a text.
        """
        raise UserError(
            f"{self.name} does not tell which row comes before another, which this SAE compares it with: "
            "give data that a language model computes from text, such as data=stdlib."
        )

    def in_whole_rows(self) -> Self:
        """Return the same data in training batches of whole text rows (TextBatch), from the beginning of the stream.

        Raises:
            UserError: the data have no text rows.
        """
        raise UserError(
            f"{self.name} gives activations in no order of a text, which loss=kl_mse needs: choose data of text, such "
            "as data=text_files, or leave loss out."
        )
