"""Default back end: any causal language model that `transformers` loads, with hooks on its modules."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.lm.hooked import Hooks, SiteHook, text_config_of
from sae_lab.lm.loading import LoadedLM
from sae_lab.lm.sites import Place, find_blocks, module_places, transformer_lens_places


class TransformersLM(LoadedLM):
    """A model run by `transformers`. A site is a module path and means the module's output.

    If the output is a tuple, the site is its first element.
    `transformer.h.2` in GPT-2, or `model.layers.14` in Llama, Gemma and Qwen, is the residual stream after that block;
    `model.layers.14.input` is the residual stream before it. In the architectures of `sites.FAMILIES`, TransformerLens
    names such as `blocks.14.hook_resid_pre` work too.

    Arguments and errors are those of LoadedLM.
    """

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every valid site name, with its place in the model."""
        return module_places(self.model) | self.transformer_lens_places

    @cached_property
    def transformer_lens_places(self) -> dict[str, Place]:
        config = text_config_of(getattr(self.model, "config", None))
        return transformer_lens_places(getattr(config, "model_type", ""), find_blocks(self.model))

    def known_sites(self) -> list[str]:
        return list(self.places)

    def describe_choices(self) -> str:
        blocks = find_blocks(self.model)
        paths = f"{blocks[0]} ... {blocks[-1]}" if blocks else f"{self.known_sites()[:8]}"
        hooks = ", ".join(name.removeprefix("blocks.0.") for name in self.transformer_lens_places if ".0." in name)
        return f"choose among {paths}, or blocks.i of {hooks}." if hooks else f"choose among {paths}."

    def forward(self, tokens: Int[Tensor, "n t"], hooks: Hooks) -> Float[Tensor, "n t v"]:
        with self.hooked(hooks):
            out = self.model(tokens, **self.call_options)
        return getattr(out, "logits", out)

    @cached_property
    def call_options(self) -> dict[str, bool]:
        """Keyword arguments of a forward pass: none for a module that is not of `transformers`."""
        return {} if text_config_of(getattr(self.model, "config", None)) is None else {"use_cache": False}

    def unembedding(self) -> Float[Tensor, "v d"] | None:
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        if head is None:
            return None
        return head.weight if is_plain(head.weight) else weight_of_linear(head, self.d, self.dtype)

    def embedding(self) -> Float[Tensor, "v d"] | None:
        weight = getattr(self.model.get_input_embeddings(), "weight", None)
        return weight if weight is not None and is_plain(weight) else None

    @contextmanager
    def hooked(self, hooks: Hooks) -> Iterator[None]:
        """Register the hooks on their modules; remove them when the context ends."""
        with ExitStack() as handles:
            for site, hook in hooks.items():
                path, side = self.places[site]
                module = self.model.get_submodule(path)
                if side == "input":
                    handle = module.register_forward_pre_hook(on_first_input(hook), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(on_first_output(hook))
                handles.callback(handle.remove)
            yield


def is_plain(weight: Tensor) -> bool:
    """Return whether a weight holds its numbers as they are: a quantised one is of integers or a subclass of Tensor."""
    return weight.is_floating_point() and type(weight) in (Tensor, nn.Parameter) and type(weight.data) is Tensor


@torch.no_grad()
def weight_of_linear(linear: nn.Module, d: int, dtype: torch.dtype) -> Float[Tensor, "v d"]:
    """Return the matrix of a linear map, however it is stored, from what it does to the unit vectors."""
    units = torch.eye(d, dtype=dtype, device=next(linear.parameters()).device)
    return (linear(units) - linear(torch.zeros_like(units[:1]))).T


def on_first_output(hook: SiteHook):
    """Return a torch forward hook that applies `hook` to a module's output, or to the first element of a tuple."""

    def forward_hook(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        first, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        new = hook(first)
        if new is None:
            return None
        return new if rest is None else (new, *rest)

    return forward_hook


def on_first_input(hook: SiteHook):
    """Return a torch forward pre-hook that applies `hook` to a module's first argument, positional or keyword."""

    def pre_hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = hook(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        name = next(iter(kwargs), "")
        new = hook(kwargs.get(name))
        return None if new is None else (args, kwargs | {name: new})

    return pre_hook
