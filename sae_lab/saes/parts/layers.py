"""Which sources each latent reads and writes: all of them, or those that belong to its layer."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.ops.row_gradients import select_rows
from sae_lab.ops.sparse import Pattern, SparseCode, attach_encoder_gradient


class OneLayer(nn.Module):
    """Every latent reads all r sources and writes all w sources."""

    n_layers: int = 1

    def attach_gradients(
        self,
        code: SparseCode,
        x: Float[Tensor, "b r n"],
        center: Float[Tensor, "r n"],
        W: Float[Tensor, "f _ n"],
        b_enc: Float[Tensor, " f"] | None,
    ) -> SparseCode:
        """Return the code with gradients for the encoder that computed it: h = (x - center) Wᵀ [+ b_enc]."""
        return attach_encoder_gradient(code, x, center, W, b_enc)

    def encoder_rows(self, W: Float[Tensor, "f _ n"], latents: Int[Tensor, " c"]) -> Float[Tensor, "c r*n"]:
        """Return the encoder rows of some latents, flattened over all r sources; zeros for the number f."""
        return select_rows(W.flatten(1), latents, W)


class CrossLayers(OneLayer):
    """The latents are split into L equal consecutive parts: part l reads source l and writes sources l ... L.

    Args:
        n_layers: L, which equals r and w.
        n_latents: f, a multiple of L.
    """

    unwritten: Tensor
    """(f, L, 1) bool: True at the layers that a latent does not write, those before its own."""

    def __init__(self, n_layers: int, n_latents: int):
        super().__init__()
        self.n_layers, self.n_latents = n_layers, n_latents
        unwritten = torch.arange(n_layers) < self.layer_of(torch.arange(n_latents)).unsqueeze(1)
        self.register_buffer("unwritten", unwritten.unsqueeze(-1), persistent=False)

    def layer_of(self, latents: Int[Tensor, " c"]) -> Int[Tensor, " c"]:
        """Return the layer to which each latent belongs."""
        return latents // (self.n_latents // self.n_layers)

    def attach_gradients(
        self,
        code: SparseCode,
        x: Float[Tensor, "b L n"],
        center: Float[Tensor, "L n"],
        W: Float[Tensor, "f 1 n"],
        b_enc: Float[Tensor, " f"] | None,
    ) -> SparseCode:
        """Return the code with gradients, by treating a row as L rows, one per layer. The order of entries stays."""
        pattern = code.pattern
        layer_rows = pattern.rows * self.n_layers + self.layer_of(pattern.latents)
        row_offsets = torch.searchsorted(layer_rows, torch.arange(len(x) * self.n_layers + 1, device=layer_rows.device))
        by_layer = SparseCode(Pattern(row_offsets, pattern.latents, self.n_latents, pattern.padded), code.values)
        attached = attach_encoder_gradient(by_layer, x.flatten(0, 1).unsqueeze(1), center[:1], W, b_enc)
        return SparseCode(pattern, attached.values)

    def encoder_rows(self, W: Float[Tensor, "f 1 n"], latents: Int[Tensor, " c"]) -> Float[Tensor, "c L*n"]:
        """Return the encoder rows of some latents, zero at all sources except that of their layer."""
        rows = W.new_zeros(len(latents), self.n_layers, W.shape[-1])
        layer = self.layer_of(latents).clamp_max(self.n_layers - 1)  # of a latent f: any, since its row is zero
        at = torch.arange(len(latents), device=latents.device), layer
        return rows.index_put(at, select_rows(W.flatten(1), latents, W)).flatten(1)
