"""The contract of a frozen language model: read activations at named sites, and run it with replaced ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from copy import copy
from functools import cached_property, reduce
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import Self

from sae_lab.lm.devices import copy_to, devices_of_rank
from sae_lab.lm.generation import generate
from sae_lab.lm.predictions import Predictions, PredictionsOfHidden, PredictionsOfRows, is_split
from sae_lab.lm.sites import check_sites, join_heads, site_names
from sae_lab.lm.splicing import splicing_hooks
from sae_lab.lm.token_ids import find_bos_id, place_tokens
from sae_lab.runtime.calls import check_call
from sae_lab.runtime.errors import SettingError, UserError

SiteHook = Callable[[Any], Tensor | None]
Hooks = Mapping[str, SiteHook]


class AllSitesReached(Exception):
    """Raised inside a forward pass to end it once every site is captured."""


class LanguageModel(ABC):
    """A frozen language model whose activations can be read and replaced at named sites.

    A back end implements `known_sites`, `describe_choices`, `forward` and `unembedding`; it may override `capture` and
    `body`.

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

    def with_sites(self, sites: Sequence[str] | str | None) -> "LanguageModel":
        """Return the same model, read at other sites. It shares the weights, and computes the same bits at each site.

        A back end that keeps something that depends on the sites, other than in a `cached_property`, must override it.
        """
        other = self._copy()
        other._read_at(sites)
        return other

    def copies(self) -> list["LanguageModel"]:
        """Return copies of this model on those of `devices` that are this rank's, but for the first, where it is.

        Raises:
            UserError: the weights are quantised.
        """
        others = devices_of_rank(self.devices)[1:] if self.devices else ()
        return [self.run_by(copy_to(self.model, device)) for device in others]

    def run_by(self, model: nn.Module) -> Self:
        """Return the same model at the same sites, run by a copy of its module."""
        other = self._copy()
        other.model = model
        return other

    def _copy(self) -> Self:
        """Return a copy that shares the module, without what was cached of sites and module."""
        other = copy(self)
        for name in [name for name in vars(self) if isinstance(getattr(type(self), name, None), cached_property)]:
            del other.__dict__[name]
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
        with suppress(AllSitesReached):
            self.forward(tokens, {site: capture_into(site, seen, len(self.sites)) for site in self.sites})
        return seen

    @abstractmethod
    def unembedding(self) -> Float[Tensor, "v d"] | None:
        """Return the matrix that maps the final residual stream to logits; None if the model has none."""

    def embedding(self) -> Float[Tensor, "v d"] | None:
        """Return the matrix whose rows are the token embeddings; None if the back end does not know it."""
        return None

    @property
    def vocab_size(self) -> int:
        """About v, by which slices of the logits are sized."""
        return self.n_ids or len(self.tokenizer)

    @property
    def body(self) -> nn.Module | None:
        """The module that computes the hidden states which the rest of the model maps to logits; None if unknown."""
        return None

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
        tokens = place_tokens(self, tokens)
        if replace is None:
            return self.forward(tokens, {})
        assert replace.shape == (*tokens.shape, len(self.sites), self.d), (replace.shape, tokens.shape)

        def put(i: int) -> SiteHook:
            return lambda x: replace_where(x, replace[:, :, i], None if where is None else where[:, :, i])

        return self.forward(tokens, {site: put(i) for i, site in enumerate(self.sites)})

    def hooked(self, hooks: Hooks) -> AbstractContextManager[None]:
        """Let the hooks act on every pass of the model inside the block.

        Raises:
            UserError: this back end sets hooks for one pass at a time.
        """
        raise UserError(
            f"{type(self).__name__} sets hooks for one pass at a time: load {self.name} with backend='transformers'."
        )

    def spliced(self, sae: Any, edit: Any = None, keep_error: bool = False) -> AbstractContextManager[None]:
        """Replace the activations at the sites by x_hat of an SAE, in every pass inside the block.

            with lm.spliced(sae, lambda z: z.index_fill(-1, latent, 8.0), keep_error=True):
                print(lm.generate("def main("))

        Args:
            sae: an SAE of these sites. An SAE of several sites must be a transcoder, whose inputs come first: other
                ones need activations of later sites to replace those of the first.
            edit: maps the dense code (b, f) to the code that is decoded.
            keep_error: add what `edit` changes to the activations, and leave in place what x_hat does not explain.

        Raises:
            UserError: the SAE does not fit the sites, or it needs later sites.
        """
        return self.hooked(splicing_hooks(self, sae, edit, keep_error))

    @check_call
    def generate(
        self,
        prompt: str,
        max_new_tokens: Annotated[int, Ge(0)] = 32,
        temperature: Annotated[float, Ge(0)] = 0.0,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> str:
        """Return the text with which the model continues a prompt; see `generate` in lm/generation.py."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[self.bos_id, *ids]])
        longer = generate(
            self.predictions, tokens, max_new_tokens, temperature=temperature, seed=seed, context=self.context
        )
        return self.tokenizer.decode(longer[0, tokens.shape[1] :])

    def predictions(
        self,
        tokens: Int[Tensor, "n t"],
        replace: Float[Tensor, "n t s d"] | None = None,
        where: Bool[Tensor, "n t s"] | None = None,
    ) -> Predictions:
        """Run the model as `logits` does, but compute the logits later, slice by slice."""
        kind = PredictionsOfHidden if self.is_split else PredictionsOfRows
        return kind(self, tokens, replace, where)

    @cached_property
    def is_split(self) -> bool:
        """Whether predictions come from hidden states, and not from whole rows; see `predictions.is_split`."""
        return self.body is not None and is_split(self, self.body)

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


def text_config_of(config: Any) -> Any:
    """Return the config of the text model in a config of `transformers`; None if it is of another library."""
    return config.get_text_config() if hasattr(config, "get_text_config") else None
