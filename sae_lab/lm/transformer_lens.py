"""Back end: TransformerLens 4, for its hook names and for HookedTransformer's activation space."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.errors import UserError
from sae_lab.lm.base import LanguageModel, SiteHook
from sae_lab.lm.transformers import load, quiet


class TransformerLensLM(LanguageModel):
    """A site is a hook name, such as `blocks.3.hook_resid_pre`: the residual stream before block 3, i.e. after block 2.

    Attention is computed eagerly, for TransformerLens hooks its scores; TransformersLM takes torch's fused kernel.

    Args:
        name, sites, dtype, device, bos_id, revision: as in TransformersLM.
        compatibility_mode: fold layer norms and centre what is written to the residual stream, as HookedTransformer
            did. The logits' softmax stays the same; the activations do not: an SAE belongs to one of the two modes.

    Raises:
        UserError: TransformerLens does not know the architecture, the model cannot be loaded, and whatever
            LanguageModel raises.
    """

    def __init__(
        self,
        name: str,
        sites: Sequence[str] | str,
        dtype: str = "float32",
        device: str = "auto",
        bos_id: int | None = None,
        revision: str | None = None,
        compatibility_mode: bool = False,
    ):
        model, tokenizer = load(name, dtype, revision)
        bridge = boot(name, model, tokenizer, compatibility_mode)
        self._hook_names = list(bridge.hook_dict)
        super().__init__(name, sites, bridge, model.config, tokenizer, device, bos_id)

    def known_sites(self) -> list[str]:
        return self._hook_names

    def blocks(self) -> list[str]:
        return [name for name in self._hook_names if name.endswith(".hook_resid_pre")]

    @contextmanager
    def hooked(self, hooks: dict[str, SiteHook]) -> Iterator[None]:
        with ExitStack() as handles:
            try:
                handles.enter_context(
                    self.model.hooks([(site, lambda x, hook, f=f: f(x)) for site, f in hooks.items()])
                )
            except ValueError as e:  # a hook point that TransformerLens keeps switched off
                raise UserError(f"lm.sites: TransformerLens does not compute it ({e}) {self._offer()}") from e
            yield

    def forward(self, tokens: Int[Tensor, "n t"]) -> Float[Tensor, "n t v"]:
        return self.model(tokens, use_cache=False)

    def unembedding(self) -> Float[Tensor, "v d"]:
        return self.model.W_U.T

    def _move(self, device: torch.device) -> None:
        self.model.to(device, print_details=False)


def boot(name: str, model: Any, tokenizer: Any, compatibility_mode: bool) -> Any:
    """A TransformerBridge around the loaded model, which lies on the CPU."""
    with quiet():  # importing it changes the verbosity of `transformers`
        from transformer_lens.model_bridge import TransformerBridge

    dtype = next(model.parameters()).dtype
    # A copy, for the bridge gives it a padding token. A tokenizer that does not say that it adds BOS would be loaded
    # again, by name and without the revision; the bridge only ever gets ids from us, so the answer does not matter.
    tokenizer = deepcopy(tokenizer)
    tokenizer.init_kwargs["add_bos_token"] = True
    try:
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model, tokenizer=tokenizer, dtype=dtype, device="cpu"
        )
        if compatibility_mode:
            bridge.enable_compatibility_mode(disable_warnings=True)
    except (KeyError, NotImplementedError, RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"TransformerLens cannot run {name} ({reason}): use lm=transformers lm.name={name}.") from e
    return bridge
