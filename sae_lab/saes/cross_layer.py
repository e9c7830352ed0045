"""Cross-layer transcoders: each latent reads one layer and writes to it and to all later layers."""

from typing import Annotated, Any

import torch
from annotated_types import Ge

from sae_lab.ops.unit_norm import divide_by_norm
from sae_lab.runtime.errors import SettingError
from sae_lab.saes.batch_topk import BatchTopKSAE
from sae_lab.saes.jumprelu import JumpReLUSAE
from sae_lab.saes.linear import LinearSAE
from sae_lab.saes.parts.layers import CrossLayers
from sae_lab.saes.topk import TopKSAE


class CrossLayer(LinearSAE):
    """Cross-layer transcoder: L layers share one code.

        h_i     = x_l W_enc_iᵀ + b_enc_i                           latent i belongs to layer l
        y_hat_m = sum_{i of layers l <= m} z_i W_dec_i,m + b_dec_m
        loss    = mean (y - y_hat)² + aux

    The sources are the inputs of L layers, x_1 ... x_L, followed by their outputs, y_1 ... y_L. The latents are split
    into L equal consecutive parts. Part l belongs to layer l: it reads x_l and writes y_l ... y_L. So a feature that
    many layers amplify is one latent instead of one per layer. Selection, thresholds and penalties work on the latents
    of all layers together; the unit of a latent is the norm of everything that it writes. A rank with a shard of the
    latents reads the inputs of their layers alone (see parts/layers.py).

    `class Mine(CrossLayer, AnySAE)` makes a cross-layer transcoder of any linear SAE.

    Ameisen, Lindsey et al. 2025, Circuit Tracing (Transformer Circuits).

    Args:
        n_sources: 2 L.
        n_inputs: L, or None for the same.
        n_latents: f, of all layers together.

    Raises:
        UserError: the sources are not pairs, n_latents is not a multiple of L, or a setting does not apply.
    """

    layers: CrossLayers

    def __init__(self, n_sources: Annotated[int, Ge(1)], n_latents: int, n_inputs: int | None = None, **linear: Any):
        n_layers = n_sources // 2
        if n_sources % 2 or n_inputs not in (None, 0, n_layers):
            raise SettingError(
                f"a cross-layer transcoder needs as many sites to predict as to read, not {{n_inputs}}={n_inputs} of "
                f"{n_sources}: give lm.sites=[<inputs of all layers>,<outputs of all layers>]."
            )
        if n_latents % n_layers:
            raise SettingError(
                f"the number of latents, {n_latents}, must be a multiple of the {n_layers} layers: change n_latents "
                "or expansion."
            )
        for name in ("hidden", "resample_every", "skip"):
            if linear.get(name):
                raise SettingError(
                    f"{{{name}}} does not apply to a cross-layer transcoder, where each latent reads one layer: "
                    "remove it."
                )
        super().__init__(n_sources=n_sources, n_latents=n_latents, n_inputs=n_layers, **linear)
        with torch.no_grad():
            self.W_dec.masked_fill_(self.layers.unwritten, 0)
            divide_by_norm(self.W_dec, self.decoder_norm)

    def build_layers(self) -> CrossLayers:
        return CrossLayers(self.n_inputs, self.n_latents, self.own_latents)

    def latent_groups(self) -> tuple[str, list[int]]:
        return "layer", [self.n_latents // self.n_inputs] * self.n_inputs

    def before_step(self) -> None:
        if self.W_dec.grad is not None:
            self.W_dec.grad.masked_fill_(self.layers.unwritten, 0)
        super().before_step()


class CrossLayerTopKSAE(CrossLayer, TopKSAE):
    """Cross-layer transcoder (see CrossLayer) with TopK's rule over the latents of all layers."""

    shardable = True


class CrossLayerBatchTopKSAE(CrossLayer, BatchTopKSAE):
    """Cross-layer transcoder (see CrossLayer) with BatchTopK's rule."""

    shardable = True


class CrossLayerJumpReLUSAE(CrossLayer, JumpReLUSAE):
    """Cross-layer transcoder (see CrossLayer) with JumpReLU's rule; the authors use penalty=tanh."""

    shardable = True
