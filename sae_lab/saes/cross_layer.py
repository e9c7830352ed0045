"""Cross-layer transcoders: latents that read one layer and write to all from there on."""

from typing import Annotated, Any

import torch
from annotated_types import Ge

from sae_lab.runtime.errors import SettingError
from sae_lab.saes.batch_topk import BatchTopKSAE
from sae_lab.saes.jumprelu import JumpReLUSAE
from sae_lab.saes.linear import LinearSAE
from sae_lab.saes.parts.layers import CrossLayers
from sae_lab.saes.parts.unit_norm import divide_by_norm
from sae_lab.saes.topk import TopKSAE


class CrossLayer(LinearSAE):
    """h_i = x_l W_enc_iᵀ + b_enc_i,   y_hat_m = sum_{i of layers l <= m} z_i W_dec_i,m + b_dec_m

    loss = mean (y - y_hat)² + aux.   The sources are what L layers read, x_1 ... x_L, then what they write,
    y_1 ... y_L; the latents are cut into L equal consecutive parts, and those of part l belong to layer l. A feature
    that many layers amplify is one latent instead of one a layer. Selection, thresholds and penalties go over all
    layers together, with a latent's unit the norm of all that it writes (`class Mine(CrossLayer, AnySAE)`).

    Ameisen, Lindsey et al. 2025, Circuit Tracing (Transformer Circuits).

    Args:
        n_sources: 2 L.
        n_inputs: L, which is also what None means.
        n_latents: of all layers together.

    Raises:
        UserError: sources that are not pairs, latents that cannot be shared out, or a setting for plain encoders.
    """

    layers: CrossLayers

    def __init__(self, n_sources: Annotated[int, Ge(1)], n_latents: int, n_inputs: int | None = None, **linear: Any):
        n_layers = n_sources // 2
        if n_sources % 2 or n_inputs not in (None, 0, n_layers):
            raise SettingError(
                f"a cross-layer transcoder wants as many sites to predict as to read, not {{n_inputs}}={n_inputs} of "
                f"{n_sources}: give lm.sites=[<inputs of all layers>,<outputs of all layers>]."
            )
        if n_latents % n_layers:
            raise SettingError(
                f"{n_latents} latents cannot be shared out among {n_layers} layers: give n_latents=<a multiple>."
            )
        for name in ("hidden", "resample_every", "skip"):
            if linear.get(name):
                raise SettingError(
                    f"{{{name}}} does not go with a cross-layer transcoder, whose latents read one layer each."
                )
        super().__init__(n_sources=n_sources, n_latents=n_latents, n_inputs=n_layers, **linear)
        with torch.no_grad():
            self.W_dec.masked_fill_(self.layers.unwritten, 0)
            divide_by_norm(self.W_dec, self.decoder_norm)

    def build_layers(self) -> CrossLayers:
        return CrossLayers(self.n_inputs, self.n_latents)

    def before_step(self) -> None:
        if self.W_dec.grad is not None:
            self.W_dec.grad.masked_fill_(self.layers.unwritten, 0)
        super().before_step()


class CrossLayerTopKSAE(CrossLayer, TopKSAE):
    """A cross-layer transcoder (see CrossLayer) with the rule of TopK over the latents of all layers."""


class CrossLayerBatchTopKSAE(CrossLayer, BatchTopKSAE):
    """A cross-layer transcoder (see CrossLayer) with the rule of BatchTopK."""


class CrossLayerJumpReLUSAE(CrossLayer, JumpReLUSAE):
    """A cross-layer transcoder (see CrossLayer) with the rule of JumpReLU; penalty=tanh is the authors'."""
