"""Two language models run on the same tokens, for model diffing."""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.lm.base import Hooks, LanguageModel
from sae_lab.lm.loading import place_model
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError, UserError


class PairedLM(LanguageModel):
    """A base model and its fine-tuned version. Sources are the sites of `base`, then those of `tuned`.

    Sites are named `base.<site>` and `tuned.<site>`. The logits are those of the model that `spliced` names, with and
    without replaced activations; replacing activations of the other model does not change them.

    Args:
        base: the base model.
        tuned: a model with the same vocabulary, activation width and number of sites.
        spliced: the model that gives the logits and the cross-entropy: `base` or `tuned`.
        device: device of both models.

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
        device: str = "auto",
    ):
        self.pair = {"base": base, "tuned": tuned}
        check_alike(base, tuned)
        self.spliced = spliced
        super().__init__(
            name=f"{base.name} and {tuned.name}",
            sites=[f"{which}.{site}" for which, lm in self.pair.items() for site in lm.sites],
            model=nn.ModuleDict({which: place_model(lm.model, device) for which, lm in self.pair.items()}),
            config=base.model.config,
            tokenizer=base.tokenizer,
            bos_id=base.bos_id,
        )

    def known_sites(self) -> list[str]:
        return [f"{which}.{site}" for which, lm in self.pair.items() for site in lm.known_sites()]

    def describe_choices(self) -> str:
        return f"for each of {' and '.join(self.pair)}, {self.pair['base'].describe_choices()}"

    def forward(self, tokens: Int[Tensor, "n t"], hooks: Hooks) -> Float[Tensor, "n t v"]:
        lm = self.pair[self.spliced]
        names = {site: f"{self.spliced}.{site}" for site in lm.sites}
        return lm.forward(tokens, {site: hooks[name] for site, name in names.items() if name in hooks})

    def capture(self, tokens: Int[Tensor, "n t"]) -> dict[str, Float[Tensor, "n t ..."]]:
        return {f"{which}.{site}": x for which, lm in self.pair.items() for site, x in lm.capture(tokens).items()}

    def unembedding(self) -> None:
        """Return None, because a latent of a crosscoder writes to two models."""


def check_alike(base: LanguageModel, tuned: LanguageModel) -> None:
    """Raise a UserError unless both models have the same vocabulary, number of sites and activation width."""
    if base.tokenizer.get_vocab() != tuned.tokenizer.get_vocab():
        raise UserError(
            f"lm.base.name={base.name} and lm.tuned.name={tuned.name} have different vocabularies: "
            "both models must use the same tokenizer."
        )
    if (len(base.sites), base.d) != (len(tuned.sites), tuned.d):
        raise SettingError(
            f"{base.name} has {len(base.sites)} sites of width {base.d}, {tuned.name} {len(tuned.sites)} of {tuned.d}: "
            "{base}.sites and {tuned}.sites must agree in number and width."
        )
