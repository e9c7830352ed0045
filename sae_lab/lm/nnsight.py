"""nnsight back end, which reads and replaces activations inside a traced forward pass. Install `sae-lab[nnsight]`."""

from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.lm.hooked import Hooks
from sae_lab.lm.transformers import TransformersLM
from sae_lab.runtime.errors import UserError


class NnsightLM(TransformersLM):
    """A `transformers` model run by nnsight, with the site names of TransformersLM.

    The site `transformer.h.2.output`, or `transformer.h.2` for short, is `model.transformer.h[2].output[0]` in nnsight.

    Arguments are those of LoadedLM.

    Raises:
        UserError: nnsight is not installed; and the errors of LoadedLM.
    """

    def wrap(self, name: str, model: Any, tokenizer: Any) -> Any:
        if find_spec("nnsight") is None:
            raise UserError("lm=nnsight needs a package that is not installed: pip install 'sae-lab[nnsight]'.")
        return model

    @cached_property
    def envoy(self) -> Any:
        """The model, wrapped by nnsight."""
        from nnsight import NNsight

        return NNsight(self.model)

    @cached_property
    def execution_order(self) -> list[str]:
        """The sites in the order in which a forward pass computes them; nnsight must access them in that order."""
        order: list[str] = []
        with self.hooked({site: lambda _x, site=site: order.append(site) for site in self.sites}):  # type: ignore[misc]
            self.model(torch.full((1, 2), self.bos_id, device=self.device), **self.call_options)
        return order

    def capture(self, tokens: Int[Tensor, "n t"]) -> dict[str, Float[Tensor, "n t ..."]]:
        seen = {}
        with self.envoy.trace(tokens, **self.call_options) as tracer:
            for site in self.execution_order:
                seen[site] = self._read(site)
            tracer.stop()
        return seen

    def forward(self, tokens: Int[Tensor, "n t"], hooks: Hooks) -> Float[Tensor, "n t v"]:
        with self.envoy.trace(tokens, **self.call_options):
            for site in self.execution_order:
                if site in hooks:
                    self._write(site, hooks[site](self._read(site)))
            out = self.envoy.output
            logits = getattr(out, "logits", out).save()
        return logits  # noqa: RET504 (it has no value before the trace ends)

    def _read(self, site: str) -> Any:
        path, side = self.places[site]
        value = getattr(self.envoy.get(path), side)
        return value[0] if isinstance(value, tuple) else value

    def _write(self, site: str, new: Tensor | None) -> None:
        if new is None:
            return
        path, side = self.places[site]
        module = self.envoy.get(path)
        value = getattr(module, side)
        setattr(module, side, (new, *value[1:]) if isinstance(value, tuple) else new)
