"""The contract of a frozen language model: read activations at named sites, and run it with replaced ones."""

from abc import abstractmethod
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lab.lm.generation import generate
from sae_lab.lm.hooked import HookedModel, SiteHook
from sae_lab.lm.predictions import Predictions, PredictionsOfHidden, PredictionsOfRows, is_split
from sae_lab.lm.splicing import splicing_hooks
from sae_lab.lm.token_ids import place_tokens
from sae_lab.runtime.calls import check_call


class LanguageModel(HookedModel):
    """A frozen language model whose activations can be read and replaced at named sites.

    `HookedModel` reads; this class predicts tokens, with and without replaced activations. A back end implements
    `known_sites`, `describe_choices`, `forward` and `unembedding`; it may override `capture`, `hooked`, `embedding` and
    `body`.

    Attributes, arguments and errors are those of HookedModel.
    """

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


def replace_where(x: Tensor, new: Float[Tensor, "n t d"], where: Bool[Tensor, "n t"] | None) -> Tensor:
    """Replace a site's activation x by `new` where `where` is True; keep the shape, dtype and device of x."""
    new = new.reshape(x.shape).to(x)
    return new if where is None else torch.where(where.to(x.device).view(*x.shape[:2], *[1] * (x.ndim - 2)), new, x)
