"""Back end: TransformerLens 4, for its hook names and for HookedTransformer's activation space."""

from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.lm.base import Hooks
from sae_lab.lm.loading import LoadedLM, quiet
from sae_lab.runtime.errors import UserError


class TransformerLensLM(LoadedLM):
    """A site is a hook name, such as `blocks.3.hook_resid_pre`: the residual stream before block 3, i.e. after block 2.

    Attention is computed eagerly, for TransformerLens hooks its scores; TransformersLM takes torch's fused kernel.

    Args:
        compatibility_mode: fold layer norms and centre what is written to the residual stream, as HookedTransformer
            did. The logits' softmax stays the same; the activations do not: an SAE belongs to one of the two modes.
        model: the other arguments of LoadedLM.

    Raises:
        UserError: TransformerLens does not know the architecture, and whatever LoadedLM raises.
    """

    def __init__(self, name: str, sites: Sequence[str] | str, compatibility_mode: bool = False, **model: Any):
        self.compatibility_mode = compatibility_mode
        super().__init__(name, sites, **model)

    def adopt(self, name: str, model: Any, tokenizer: Any) -> Any:
        return boot(name, model, tokenizer, self.compatibility_mode)

    def known_sites(self) -> list[str]:
        return list(self.model.hook_dict)

    def describe_choices(self) -> str:
        blocks = [name for name in self.model.hook_dict if name.endswith(".hook_resid_pre")]
        return f"choose among {blocks[0]} ... {blocks[-1]}."

    def forward(self, tokens: Int[Tensor, "n t"], hooks: Hooks) -> Float[Tensor, "n t v"]:
        with ExitStack() as handles:
            try:
                handles.enter_context(
                    self.model.hooks([(site, lambda x, hook, f=f: f(x)) for site, f in hooks.items()])
                )
            except ValueError as e:  # a hook point that TransformerLens keeps switched off
                raise UserError(f"lm.sites: TransformerLens does not compute it ({e}) {self.describe_choices()}") from e
            return self.model(tokens, use_cache=False)

    def unembedding(self) -> Float[Tensor, "v d"]:
        return self.model.W_U.T


def boot(name: str, model: Any, tokenizer: Any, compatibility_mode: bool) -> Any:
    """A TransformerBridge around the loaded model, on the device or devices where that lies."""
    with quiet():  # importing it changes the verbosity of `transformers`
        from transformer_lens.model_bridge import TransformerBridge

    device = None if hasattr(model, "hf_device_map") else model.device
    # A copy, for the bridge gives it a padding token. A tokenizer that does not say that it adds BOS would be loaded
    # again, by name and without the revision; the bridge only ever gets ids from us, so the answer does not matter.
    tokenizer = deepcopy(tokenizer)
    tokenizer.init_kwargs["add_bos_token"] = True
    try:
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model, tokenizer=tokenizer, dtype=model.dtype, device=device
        )
        if compatibility_mode:
            bridge.enable_compatibility_mode(disable_warnings=True)
    except (KeyError, NotImplementedError, RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(f"TransformerLens cannot run {name} ({reason}): use lm=transformers lm.name={name}.") from e
    return bridge
