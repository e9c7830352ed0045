"""Which sources each latent reads and writes: all of them, or those that belong to its layer."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.ops.row_gradients import select_rows
from sae_lab.ops.sparse import Pattern, SparseCode, attach_encoder_gradient


class OneLayer(nn.Module):
    """Every latent reads all r sources and writes all w sources."""

    n_layers: int = 1
    sizes: Sequence[int] = ()
    """Latents of this process in each of the layers that they read; none: all read the same."""

    def own_sources(self, x: Float[Tensor, "*b r n"]) -> Float[Tensor, "*b k n"]:
        """Return the k sources that the latents of this process read. All other methods take these alone."""
        return x

    def attach_gradients(
        self,
        code: SparseCode,
        x: Float[Tensor, "b k n"],
        center: Float[Tensor, "k n"],
        W: Float[Tensor, "f _ n"],
        b_enc: Float[Tensor, " f"] | None,
    ) -> SparseCode:
        """Return the code with gradients for the encoder that computed it: h = (x - center) Wᵀ [+ b_enc]."""
        return attach_encoder_gradient(code, x, center, W, b_enc)

    def encoder_rows(self, W: Float[Tensor, "f _ n"], latents: Int[Tensor, " c"]) -> Float[Tensor, "c k*n"]:
        """Return the encoder rows of some latents, flattened over all k sources; zeros for the number f."""
        return select_rows(W.flatten(1), latents, W)


class CrossLayers(OneLayer):
    """The latents are split into L equal consecutive parts: part l reads source l and writes sources l ... L.

    A process may hold any consecutive latents. They belong to k consecutive layers, whose sources alone it reads. In
    the methods here f counts its latents, and its latents and layers are numbered from 0.

    Args:
        n_layers: L, which equals r and w.
        n_latents: of all processes, a multiple of L.
        own: the latents of this process.
    """

    unwritten: Tensor
    """(f, L, 1) bool: True at the layers that a latent does not write, those before its own."""

    def __init__(self, n_layers: int, n_latents: int, own: range):
        super().__init__()
        self.n_layers, self.part, self.own = n_layers, n_latents // n_layers, own
        self.own_layers = range(own.start // self.part, (own.stop - 1) // self.part + 1)
        parts = (range(layer * self.part, (layer + 1) * self.part) for layer in self.own_layers)
        self.sizes = [min(part.stop, own.stop) - max(part.start, own.start) for part in parts]
        layer = self.own_layers.start + self.layer_of(torch.arange(len(own)))
        self.register_buffer("unwritten", (torch.arange(n_layers) < layer.unsqueeze(1)).unsqueeze(-1), persistent=False)

    def layer_of(self, latents: Int[Tensor, " c"]) -> Int[Tensor, " c"]:
        """Return the layer to which each latent belongs."""
        return (latents + self.own.start) // self.part - self.own_layers.start

    def own_sources(self, x: Float[Tensor, "*b L n"]) -> Float[Tensor, "*b k n"]:
        return x[..., self.own_layers.start : self.own_layers.stop, :]

    def attach_gradients(
        self,
        code: SparseCode,
        x: Float[Tensor, "b k n"],
        center: Float[Tensor, "k n"],
        W: Float[Tensor, "f 1 n"],
        b_enc: Float[Tensor, " f"] | None,
    ) -> SparseCode:
        """Return the code with gradients, by treating a row as k rows, one per layer. The order of entries stays."""
        pattern, k = code.pattern, len(self.own_layers)
        layer_rows = pattern.rows * k + self.layer_of(pattern.latents)
        row_offsets = torch.searchsorted(layer_rows, torch.arange(len(x) * k + 1, device=layer_rows.device))
        by_layer = SparseCode(Pattern(row_offsets, pattern.latents, pattern.n_latents, pattern.padded), code.values)
        attached = attach_encoder_gradient(by_layer, x.flatten(0, 1).unsqueeze(1), center[:1], W, b_enc)
        return SparseCode(pattern, attached.values)

    def encoder_rows(self, W: Float[Tensor, "f 1 n"], latents: Int[Tensor, " c"]) -> Float[Tensor, "c k*n"]:
        """Return the encoder rows of some latents, zero at all sources except that of their layer."""
        rows = W.new_zeros(len(latents), len(self.own_layers), W.shape[-1])
        layer = self.layer_of(latents).clamp_max(len(self.own_layers) - 1)  # of a latent f: any, since its row is zero
        at = torch.arange(len(latents), device=latents.device), layer
        return rows.index_put(at, select_rows(W.flatten(1), latents, W)).flatten(1)
