"""TransformerLens 4 back end, with its hook names and HookedTransformer's activation space."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.lm.finding import quiet
from sae_lab.lm.hooked import Hooks
from sae_lab.lm.loading import LoadedLM, ModelName, decoder_of
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import SettingError, UserError


class TransformerLensLM(LoadedLM):
    """A model run by TransformerLens. A site is a hook name, such as `blocks.3.hook_resid_pre`, the input of block 3.

    Attention is computed eagerly because TransformerLens hooks its scores; TransformersLM uses torch's fused kernel.

    Args:
        name: as in LoadedLM.
        sites: as in LoadedLM.
        compatibility_mode: fold layer norms and center the writes to the residual stream, as HookedTransformer does.
            The predicted probabilities stay the same, but the activations change: an SAE trained in one mode does not
            work in the other.
        model: the other arguments of LoadedLM.

    Raises:
        UserError: TransformerLens does not support the architecture; and the errors of LoadedLM.
    """

    compatibility_mode = False

    @check_arguments
    def __init__(
        self, name: ModelName, sites: Sequence[str] | str | None, compatibility_mode: bool = False, **model: Any
    ):
        self.compatibility_mode = compatibility_mode
        super().__init__(name, sites, **model)

    def wrap(self, name: str, model: Any, tokenizer: Any) -> Any:
        return boot_bridge(name, model, tokenizer, self.compatibility_mode)

    def known_sites(self) -> list[str]:
        return list(self.model.hook_dict)

    def describe_choices(self) -> str:
        blocks = [name for name in self.model.hook_dict if name.endswith(".hook_resid_pre")]
        return f"choose among {blocks[0]} ... {blocks[-1]}."

    def forward(self, tokens: Int[Tensor, "n t"], hooks: Hooks) -> Float[Tensor, "n t v"]:
        with self.hooked(hooks):
            return self.model(tokens, use_cache=False)

    @contextmanager
    def hooked(self, hooks: Hooks) -> Iterator[None]:
        with ExitStack() as handles:
            try:
                handles.enter_context(
                    self.model.hooks([(site, lambda x, hook, f=f: f(x)) for site, f in hooks.items()])
                )
            except ValueError as e:  # a hook point that is disabled by default in TransformerLens
                raise SettingError(
                    f"{{sites}}: TransformerLens does not compute this hook ({e}): {self.describe_choices()}"
                ) from e
            yield

    @property
    def body(self) -> nn.Module | None:
        return decoder_of(self.model.original_model)

    def unembedding(self) -> Float[Tensor, "v d"]:
        return self.model.W_U.T

    def embedding(self) -> Float[Tensor, "v d"]:
        return self.model.W_E


def boot_bridge(name: str, model: Any, tokenizer: Any, compatibility_mode: bool) -> Any:
    """Wrap the loaded model in a TransformerBridge, on the same device or devices."""
    with quiet():  # this import changes the verbosity of `transformers`
        from transformer_lens.model_bridge import TransformerBridge

    device = None if hasattr(model, "hf_device_map") else model.device
    # Copied because the bridge adds a padding token. Without add_bos_token=True, the bridge would load the tokenizer
    # again, by name and without the revision. The value does not matter, as the bridge gets token ids, never text.
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
