"""Two language models run on the same tokens, for model diffing."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.lm.base import LanguageModel
from sae_lab.lm.devices import Devices
from sae_lab.lm.hooked import Hooks
from sae_lab.lm.loading import place_copies, place_model
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.runtime.plain_text import plural


class PairedLM(LanguageModel):
    """A base model and its fine-tuned version. Sources are the sites of `base`, then those of `tuned`.

    Sites are named `base.<site>` and `tuned.<site>`. The logits are those of the model that `spliced` names, with and
    without replaced activations; replacing activations of the other model does not change them.

    Args:
        base: the base model.
        tuned: a model with the same activation width and number of sites. One vocabulary must contain the other, with
            equal ids, and the text is tokenized with the smaller one.
        spliced: the model that gives the logits and the cross-entropy: `base` or `tuned`.
        device: device of both models; None: each stays where it is, and activations go to the one that is spliced.
        devices: devices on which copies of the pair compute the activations of training; see LoadedLM.

    Raises:
        UserError: the models differ in vocabulary, width or number of sites; or `spliced` is unknown.
    """

    models = ("base", "tuned")

    @check_arguments
    def __init__(
        self,
        base: LanguageModel,
        tuned: LanguageModel,
        spliced: Literal["base", "tuned"] = "tuned",
        device: str | None = "auto",
        devices: Devices = None,
    ):
        if devices is not None:
            self.devices, device = place_copies(devices, device)
        self.pair = {"base": base, "tuned": tuned}
        check_alike(base, tuned)
        self.of_logits = spliced
        shared = with_smaller_vocabulary(base, tuned)
        super().__init__(
            name=f"{base.name} and {tuned.name}",
            sites=[f"{which}.{site}" for which, lm in self.pair.items() for site in lm.sites],
            model=nn.ModuleDict({which: place_model(lm.model, device) for which, lm in self.pair.items()}),
            config=getattr(base.model, "config", None),
            tokenizer=shared.tokenizer,
            bos_id=shared.bos_id,
            n_ids=min((lm.n_ids for lm in (base, tuned) if lm.n_ids is not None), default=None),
        )
        self.context = min((lm.context for lm in (base, tuned) if lm.context is not None), default=None)

    @property
    def device(self) -> torch.device:
        return self.pair[self.of_logits].device

    def known_sites(self) -> list[str]:
        return [f"{which}.{site}" for which, lm in self.pair.items() for site in lm.known_sites()]

    def describe_choices(self) -> str:
        return f"for each of {' and '.join(self.pair)}, {self.pair['base'].describe_choices()}"

    def forward(self, tokens: Int[Tensor, "n t"], hooks: Hooks) -> Float[Tensor, "n t v"]:
        lm = self.pair[self.of_logits]
        names = {site: f"{self.of_logits}.{site}" for site in lm.sites}
        return lm.forward(tokens.to(lm.device), {site: hooks[name] for site, name in names.items() if name in hooks})

    def capture(self, tokens: Int[Tensor, "n t"]) -> dict[str, Float[Tensor, "n t ..."]]:
        return {
            f"{which}.{site}": x
            for which, lm in self.pair.items()
            for site, x in lm.capture(tokens.to(lm.device)).items()
        }

    def run_by(self, model: nn.Module) -> "PairedLM":
        other = super().run_by(model)
        other.pair = {which: lm.run_by(model[which]) for which, lm in self.pair.items()}  # type: ignore[index]
        return other

    @property
    def body(self) -> nn.Module | None:
        return self.pair[self.of_logits].body

    def unembedding(self) -> None:
        """Return None, because a latent of a crosscoder writes to two models."""


def check_alike(base: LanguageModel, tuned: LanguageModel) -> None:
    """Raise a UserError unless both models have the same ids, number of sites and activation width."""
    a, b = base.tokenizer.get_vocab(), tuned.tokenizer.get_vocab()
    small, large = sorted((a, b), key=len)
    if not small.items() <= large.items():
        token = next(token for token in small if small[token] != large.get(token))
        raise UserError(
            f"lm.base.name={base.name} and lm.tuned.name={tuned.name} have different vocabularies (the token {token!r} "
            f"has id {a.get(token)} in one and {b.get(token)} in the other): give models of which one's vocabulary "
            "contains the other's, with equal ids."
        )
    if (len(base.sites), base.d) != (len(tuned.sites), tuned.d):
        raise SettingError(
            f"{base.name} has {plural(len(base.sites), 'site')} of width {base.d}, {tuned.name} {len(tuned.sites)} of "
            f"{tuned.d}: {{base}}.sites and {{tuned}}.sites must agree in number and width."
        )


def with_smaller_vocabulary(base: LanguageModel, tuned: LanguageModel) -> LanguageModel:
    """Return the model whose tokens both models know: chat models add tokens. The base model if they are the same."""
    return min(base, tuned, key=lambda lm: len(lm.tokenizer.get_vocab()))
