"""The contract of a frozen language model: read activations at named sites, and run it with replaced ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lab.lm.sites import check_sites, join_heads, site_names
from sae_lab.runtime.errors import SettingError, UserError

SiteHook = Callable[[Any], Tensor | None]
Hooks = Mapping[str, SiteHook]


class AllSitesReached(Exception):
    """Raised inside a forward pass to end it once every site is captured."""


class LanguageModel(ABC):
    """A frozen language model whose activations can be read and replaced at named sites.

    A back end implements `known_sites`, `describe_choices`, `forward` and `unembedding`; it may override `capture`.

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
        model: the `nn.Module` that runs, in eval mode; its parameters require no gradient.

    Raises:
        UserError: a site is unknown, never computed or repeated; sites have different widths; there is no BOS.
    """

    models: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        sites: Sequence[str] | str | None,
        model: nn.Module,
        config: Any,
        tokenizer: Any,
        bos_id: int | None,
    ):
        self.name, self.tokenizer = name, tokenizer
        self.sites = site_names(sites)
        text_config = config.get_text_config()
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)
        self.bos_id = find_bos_id(name, tokenizer, bos_id, text_config.vocab_size)
        self.model: Any = model.eval().requires_grad_(False)
        check_sites(name, sites, self.known_sites(), self.describe_choices())
        self.d = self._width()

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
        with suppress(AllSitesReached):
            self.forward(tokens, {site: capture_into(site, seen, len(self.sites)) for site in self.sites})
        return seen

    @abstractmethod
    def unembedding(self) -> Float[Tensor, "v d"] | None:
        """Return the matrix that maps the final residual stream to logits; None if the model has none."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def activations(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t s d"]:
        """Return the activations at the sites, in the model's dtype and on its device, without gradient.

        Nothing after the last site runs. The result is not an inference tensor, so autograd can save it.
        """
        seen = self._vectors(tokens)
        return torch.stack([seen[site].to(self.device) for site in self.sites], dim=2)

    def logits(
        self,
        tokens: Int[Tensor, "n t"],
        replace: Float[Tensor, "n t s d"] | None = None,
        where: Bool[Tensor, "n t s"] | None = None,
    ) -> Float[Tensor, "n t v"]:
        """Return the logits in the model's dtype, optionally with replaced activations.

        Args:
            tokens: rows of token ids.
            replace: `replace[:, :, i]` takes the place of the activation at site i. Differentiable.
            where: replace only where this is True; None replaces everywhere.
        """
        tokens = self._check_length(tokens)
        if replace is None:
            return self.forward(tokens, {})
        assert replace.shape == (*tokens.shape, len(self.sites), self.d), (replace.shape, tokens.shape)

        def put(i: int) -> SiteHook:
            return lambda x: replace_where(x, replace[:, :, i], None if where is None else where[:, :, i])

        return self.forward(tokens, {site: put(i) for i, site in enumerate(self.sites)})

    def _vectors(self, tokens: Int[Tensor, "n t"]) -> dict[str, Float[Tensor, "n t d"]]:
        tokens = self._check_length(tokens)
        seen = self.capture(tokens)
        missing = [site for site in self.sites if site not in seen]
        if missing:
            raise SettingError(
                f"{{sites}}: {self.name} never computes {missing} in a forward pass: {self.describe_choices()}"
            )
        return {site: join_heads(site, seen[site], tokens) for site in self.sites}

    def _check_length(self, tokens: Int[Tensor, "n t"]) -> Int[Tensor, "n t"]:
        """Return the tokens on the model's device; raise a UserError if the rows exceed the model's context."""
        if self.context is not None and tokens.shape[1] > self.context:
            raise UserError(
                f"seq_len={tokens.shape[1]} exceeds the context of {self.name}: use seq_len={self.context} or less."
            )
        return tokens.to(self.device)

    @torch.no_grad()
    def _width(self) -> int:
        widths = {site: x.shape[-1] for site, x in self._vectors(torch.full((1, 2), self.bos_id)).items()}
        if len(set(widths.values())) > 1:
            raise SettingError(f"{{sites}} have different widths {widths}: all sites must have the same width.")
        return widths[self.sites[0]]


def capture_into(site: str, seen: dict[str, Any], n_sites: int) -> SiteHook:
    """Return a hook that stores the site's activation in `seen` and ends the forward pass once all sites are there."""

    def hook(x: Any) -> None:
        seen[site] = x
        if len(seen) == n_sites:
            raise AllSitesReached

    return hook


def replace_where(x: Tensor, new: Float[Tensor, "n t d"], where: Bool[Tensor, "n t"] | None) -> Tensor:
    """Replace a site's activation x by `new` where `where` is True; keep the shape, dtype and device of x."""
    new = new.reshape(x.shape).to(x)
    return new if where is None else torch.where(where.to(x.device).view(*x.shape[:2], *[1] * (x.ndim - 2)), new, x)


def find_bos_id(name: str, tokenizer: Any, bos_id: int | None, vocab_size: int) -> int:
    """Return the given id (which may be 0), else the tokenizer's BOS, else its EOS.

    Raises:
        UserError: the tokenizer has neither, or the id is outside the vocabulary.
    """
    for candidate in (bos_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            if not 0 <= candidate < vocab_size:
                raise SettingError(
                    f"{{bos_id}}={candidate} is not a token id of {name}: it must be between 0 and {vocab_size - 1}."
                )
            return int(candidate)
    raise SettingError(
        f"the tokenizer of {name} has neither a BOS nor an EOS token: set the token id to use with {{bos_id}}=..."
    )
