"""Two language models on the same tokens, for model diffing: the activations of one, then those of the other."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.errors import UserError
from sae_lab.lm.base import LanguageModel, SiteHook


class PairedLM(LanguageModel):
    """A base model and what it was fine-tuned to: sources are the sites of `base`, then those of `tuned`.

    Sites are called `base.<site>` and `tuned.<site>`. Logits, clean or spliced, are those of one of the two; what is
    put in place of the other's activations has no effect on them.

    Args:
        base, tuned: models of one vocabulary and one width, with as many sites.
        spliced: `base` or `tuned`: whose logits and cross-entropy are meant.
        device: of both.

    Raises:
        UserError: another vocabulary, width or number of sites, or an unknown `spliced`.
    """

    models = ("base", "tuned")

    def __init__(self, base: LanguageModel, tuned: LanguageModel, spliced: str = "tuned", device: str = "auto"):
        self.pair = {"base": base, "tuned": tuned}
        if spliced not in self.pair:
            raise UserError(f"lm.spliced={spliced} is not known: choose one of {', '.join(self.pair)}.")
        check_alike(base, tuned)
        self.spliced = spliced
        super().__init__(
            name=f"{base.name} and {tuned.name}",
            sites=[f"{which}.{site}" for which, lm in self.pair.items() for site in lm.sites],
            model=nn.ModuleDict({which: lm.model for which, lm in self.pair.items()}),
            config=base.model.config,
            tokenizer=base.tokenizer,
            device=device,
            bos_id=base.bos_id,
        )

    def known_sites(self) -> list[str]:
        return [f"{which}.{site}" for which, lm in self.pair.items() for site in lm.known_sites()]

    def blocks(self) -> list[str]:
        return [f"{which}.{site}" for which, lm in self.pair.items() for site in lm.blocks()]

    @contextmanager
    def hooked(self, hooks: dict[str, SiteHook]) -> Iterator[None]:
        with ExitStack() as both:
            for which, lm in self.pair.items():
                own = {site: hooks[f"{which}.{site}"] for site in lm.sites if f"{which}.{site}" in hooks}
                both.enter_context(lm.hooked(own))
            yield

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        return self.pair[self.spliced].forward(tokens)

    def _capture(self, tokens: Int[Tensor, "n t"]) -> dict[str, Float[Tensor, "n t d"]]:
        return {f"{which}.{site}": x for which, lm in self.pair.items() for site, x in lm._capture(tokens).items()}

    def _move(self, device: torch.device) -> None:
        for lm in self.pair.values():
            lm.to(device)


def check_alike(base: LanguageModel, tuned: LanguageModel) -> None:
    """UserError unless the two models read the same token ids and give as many activations of one width."""
    if base.tokenizer.get_vocab() != tuned.tokenizer.get_vocab():
        raise UserError(f"{base.name} and {tuned.name} have different vocabularies: give two models of one tokenizer.")
    if (len(base.sites), base.d) != (len(tuned.sites), tuned.d):
        raise UserError(
            f"{base.name} has {len(base.sites)} sites of width {base.d}, {tuned.name} {len(tuned.sites)} of {tuned.d}: "
            "give lm.base.sites and lm.tuned.sites that match."
        )
