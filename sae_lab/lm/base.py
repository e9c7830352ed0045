"""The contract of a frozen language model: token rows in; activations at named sites out, and others in their place."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lab.lm.sites import check_sites, describe_sites
from sae_lab.runtime.errors import UserError

SiteHook = Callable[[Any], Tensor | None]
Hooks = Mapping[str, SiteHook]


class AllSitesReached(Exception):
    """Raised inside a forward pass once every site is captured: the rest of the model need not run."""


class LanguageModel(ABC):
    """A frozen language model, read and written at named sites. A back end says how to hook a site and how to run.

    Shapes: n rows, t tokens a row, s sites, d activation width, v vocabulary.

    Attributes:
        name: what the user called the model.
        sites: site names, in the order of axis s.
        d: width of an activation, read from the model; the same at all sites.
        tokenizer: the model's Hugging Face tokenizer.
        bos_id: id that opens a row and parts documents.
        models: names of the models whose sources follow each other, as many of each; empty where there is but one.
        context: longest row the model was made for, in tokens; None where it does not say.
        model: what runs, an `nn.Module` in eval mode whose parameters want no gradient.

    Raises:
        UserError: an unknown, unreachable or repeated site, sites of different widths, no BOS.
    """

    models: tuple[str, ...] = ()

    def __init__(
        self, name: str, sites: Sequence[str] | str, model: nn.Module, config: Any, tokenizer: Any, bos_id: int | None
    ):
        self.name, self.tokenizer = name, tokenizer
        self.sites = (sites,) if isinstance(sites, str) else tuple(str(site) for site in sites or ())
        text_config = config.get_text_config()
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        self.bos_id = find_bos_id(name, tokenizer, bos_id, text_config.vocab_size)
        self.model: Any = model.eval().requires_grad_(False)
        check_sites(name, self.sites, self.known_sites(), self.describe_choices())
        self.d = self._width()

    @abstractmethod
    def known_sites(self) -> list[str]:
        """Every name that may be a site."""

    @abstractmethod
    def describe_choices(self) -> str:
        """The end of an error's sentence: which sites there are."""

    @abstractmethod
    def forward(self, tokens: Int[Tensor, "n t"], hooks: Hooks) -> Float[Tensor, "n t v"]:
        """Logits of a whole forward pass; a site's hook sees its activation, and may return another in its place."""

    def capture(self, tokens: Int[Tensor, "n t"]) -> dict[str, Float[Tensor, "n t ..."]]:
        """What the sites hold in a forward pass that stops at the last of them; a site may be missing."""
        seen: dict[str, Any] = {}
        with suppress(AllSitesReached):
            self.forward(tokens, {site: capture_into(site, seen, len(self.sites)) for site in self.sites})
        return seen

    @abstractmethod
    def unembedding(self) -> Float[Tensor, "v d"] | None:
        """The matrix that makes logits of the last residual stream; None where the model has none."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def activations(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t s d"]:
        """Activations at the sites, in the model's dtype and on its device. Nothing after the last site runs.

        They carry no gradient, but are ordinary tensors (not inference tensors): autograd may save them.
        """
        seen = self._vectors(tokens)
        return torch.stack([seen[site].to(self.device) for site in self.sites], dim=2)

    def logits(
        self,
        tokens: Int[Tensor, "n t"],
        replace: Float[Tensor, "n t s d"] | None = None,
        where: Bool[Tensor, "n t s"] | None = None,
    ) -> Float[Tensor, "n t v"]:
        """Logits in the model's dtype; with `replace`, site i holds `replace[:, :, i]` instead of its own activation.

        With `where`, it does so only where that is True. Differentiable in `replace`.
        """
        tokens = self._checked(tokens)
        if replace is None:
            return self.forward(tokens, {})
        assert replace.shape == (*tokens.shape, len(self.sites), self.d), (replace.shape, tokens.shape)

        def put(i: int) -> SiteHook:
            return lambda x: put_where(x, replace[:, :, i], None if where is None else where[:, :, i])

        return self.forward(tokens, {site: put(i) for i, site in enumerate(self.sites)})

    def _vectors(self, tokens: Int[Tensor, "n t"]) -> dict[str, Float[Tensor, "n t d"]]:
        tokens = self._checked(tokens)
        seen = self.capture(tokens)
        missing = [site for site in self.sites if site not in seen]
        if missing:
            raise UserError(
                f"lm.sites: {self.name} never computes {missing} in a forward pass: {self.describe_choices()}"
            )
        return {site: describe_sites(site, seen[site], tokens) for site in self.sites}

    def _checked(self, tokens: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
        if self.context is not None and tokens.shape[1] > self.context:
            raise UserError(
                f"seq_len={tokens.shape[1]} exceeds the context of {self.name}: give seq_len={self.context} or less."
            )
        return tokens.to(self.device)

    @torch.no_grad()
    def _width(self) -> int:
        widths = {site: x.shape[-1] for site, x in self._vectors(torch.full((1, 2), self.bos_id)).items()}
        if len(set(widths.values())) > 1:
            raise UserError(f"lm.sites have different widths {widths}: one SAE reads sites of one width.")
        return widths[self.sites[0]]


def capture_into(site: str, seen: dict[str, Any], n_sites: int) -> SiteHook:
    """A hook that puts what the site holds into `seen`, and ends the forward pass once that has all sites."""

    def hook(x: Any) -> None:
        seen[site] = x
        if len(seen) == n_sites:
            raise AllSitesReached

    return hook


def put_where(x: Tensor, new: Float[Tensor, "n t d"], where: Bool[Tensor, "n t"] | None) -> Tensor:
    """`new` in the shape and dtype of what a site holds, and x itself where `where` is False."""
    new = new.reshape(x.shape).to(x)
    return new if where is None else torch.where(where.to(x.device).view(*x.shape[:2], *[1] * (x.ndim - 2)), new, x)


def find_bos_id(name: str, tokenizer: Any, bos_id: int | None, vocab_size: int) -> int:
    """The given id, else the tokenizer's BOS, else its EOS (0 is an id like any other).

    Raises:
        UserError: the tokenizer has neither, or the id lies outside the vocabulary.
    """
    for candidate in (bos_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            if not 0 <= candidate < vocab_size:
                raise UserError(
                    f"lm.bos_id={candidate} is not among the {vocab_size} token ids of {name}: give one that is."
                )
            return int(candidate)
    raise UserError(
        f"the tokenizer of {name} has neither a BOS nor an EOS token: give the id to use with lm.bos_id=..."
    )
