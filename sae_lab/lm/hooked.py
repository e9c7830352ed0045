"""A frozen model whose activations can be read at named sites."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from copy import copy
from functools import cached_property, partial, reduce
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import Self

from sae_lab.lm.devices import copy_to, devices_of_rank
from sae_lab.lm.sites import check_sites, join_heads, site_names
from sae_lab.lm.token_ids import find_bos_id, place_tokens
from sae_lab.runtime.errors import SettingError, UserError

SiteHook = Callable[[Any], Tensor | None]
Hooks = Mapping[str, SiteHook]
AnyModel = TypeVar("AnyModel", bound="HookedModel")


class AllSitesReached(Exception):
    """Raised inside a forward pass to end it once every site is captured."""


class HookedModel(ABC):
    """A frozen model whose activations can be read at named sites.

    Shapes: n rows, t tokens per row, s sites, d activation width, v vocabulary.

    Attributes:
        name: the model's name, as given by the user.
        sites: site names, in the order of axis s.
        d: activation width, read from the model; the same at all sites.
        tokenizer: the model's Hugging Face tokenizer.
        bos_id: token id that begins each row and separates documents.
        models: for several models, their names in the order of axis s, where each has equally many sources; empty for
            a single model.
        context: maximum row length in tokens; None if the model's config does not have one.
        n_ids: rows of the embedding: token ids are below it; None if the model does not tell. A vocabulary may be
            smaller (padded embeddings) or larger, as long as the ids beyond do not occur.
        dtype: dtype of the activations, which differs from that of quantised weights.
        model: the `nn.Module` that runs, in eval mode; its parameters require no gradient.

    Raises:
        UserError: a site is unknown, never computed or repeated; sites have different widths; there is no BOS.
    """

    models: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    """Devices on which copies of the model compute the activations of training; see `copies`. Empty: the model's."""
    description: Mapping[str, Any] | None = None
    """The node of a config from which this model can be built again, where Python has built it."""

    def __init__(
        self,
        name: str,
        sites: Sequence[str] | str | None,
        model: nn.Module,
        config: Any,
        tokenizer: Any,
        bos_id: int | None,
        n_ids: int | None = None,
    ):
        self.name, self.tokenizer = name, tokenizer
        text_config = text_config_of(config)
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        self.n_ids: int | None = n_ids or getattr(text_config, "vocab_size", None)
        self.bos_id = find_bos_id(name, tokenizer, bos_id, self.n_ids)
        self.model: Any = model.eval().requires_grad_(False)
        self._read_at(sites)

    def with_sites(self, sites: Sequence[str] | str | None) -> Self:
        """Return the same model, read at other sites. It shares the weights, and computes the same bits at each site.

        A back end that keeps something that depends on the sites, other than in a `cached_property`, must override it.
        """
        other = copy_uncached(self)
        other._read_at(sites)
        return other

    def copies(self) -> list[Self]:
        """Return copies of this model on those of `devices` that are this rank's, but for the first, where it is.

        Raises:
            UserError: the weights are quantised.
        """
        others = devices_of_rank(self.devices)[1:] if self.devices else ()
        return [self.run_by(copy_to(self.model, device)) for device in others]

    def run_by(self, model: nn.Module) -> Self:
        """Return the same model at the same sites, run by a copy of its module."""
        other = copy_uncached(self)
        other.model = model
        return other

    def _read_at(self, sites: Sequence[str] | str | None) -> None:
        self.sites = site_names(sites)
        check_sites(self.name, sites, self.known_sites(), self.describe_choices())
        self.d, self.dtype = self._measure()

    @abstractmethod
    def known_sites(self) -> list[str]:
        """Return every valid site name."""

    @abstractmethod
    def describe_choices(self) -> str:
        """Return the end of an error message that tells the user which sites to choose from."""

    @abstractmethod
    def forward(self, tokens: Int[Tensor, "n t"], hooks: Hooks) -> Float[Tensor, "n t v"]:
        """Return the logits of a full forward pass. A hook gets its site's activation and may return a replacement."""

    def capture(self, tokens: Int[Tensor, "n t"]) -> dict[str, Float[Tensor, "n t ..."]]:
        """Return the raw activation of each site that a forward pass reaches; stop the pass after the last site."""
        seen: dict[str, Any] = {}

        def keep(site: str, x: Any) -> None:
            seen[site] = x
            if len(seen) == len(self.sites):
                raise AllSitesReached

        with suppress(AllSitesReached):
            self.forward(tokens, {site: partial(keep, site) for site in self.sites})
        return seen

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def activations(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t s d"]:
        """Return the activations at the sites, in `dtype` and on the model's device, without gradient.

        Nothing after the last site runs. The result is not an inference tensor, so autograd can save it.
        """
        seen = self._vectors(tokens)
        return torch.stack([seen[site].to(self.device) for site in self.sites], dim=2)

    def hooked(self, hooks: Hooks) -> AbstractContextManager[None]:
        """Let the hooks act on every pass of the model inside the block.

        Raises:
            UserError: this back end sets hooks for one pass at a time.
        """
        raise UserError(
            f"{type(self).__name__} sets hooks for one pass at a time: load {self.name} with backend='transformers'."
        )

    def _vectors(self, tokens: Int[Tensor, "n t"]) -> dict[str, Float[Tensor, "n t d"]]:
        tokens = place_tokens(self, tokens)
        seen = self.capture(tokens)
        missing = [site for site in self.sites if site not in seen]
        if missing:
            raise SettingError(
                f"{{sites}}: {self.name} never computes {missing} in a forward pass: {self.describe_choices()}"
            )
        return {site: join_heads(site, seen[site], tokens) for site in self.sites}

    @torch.no_grad()
    def _measure(self) -> tuple[int, torch.dtype]:
        """Return the width and the dtype of the activations, from a forward pass of two tokens."""
        vectors = self._vectors(torch.full((1, 2), self.bos_id))
        widths = {site: x.shape[-1] for site, x in vectors.items()}
        if len(set(widths.values())) > 1:
            raise SettingError(f"{{sites}} have different widths {widths}: all sites must have the same width.")
        return widths[self.sites[0]], reduce(torch.promote_types, [x.dtype for x in vectors.values()])


def copy_uncached(model: AnyModel) -> AnyModel:
    """Return a copy that shares the module, without what was cached of sites and module."""
    other, cls = copy(model), type(model)
    for name in [name for name in vars(model) if isinstance(getattr(cls, name, None), cached_property)]:
        del other.__dict__[name]
    return other


def text_config_of(config: Any) -> Any:
    """Return the config of the text model in a config of `transformers`; None if it is of another library."""
    return config.get_text_config() if hasattr(config, "get_text_config") else None
