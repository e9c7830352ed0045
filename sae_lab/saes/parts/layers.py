"""Which of the sources each latent reads and writes: all of them, or those of its layer."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.ops.sparse import Pattern, SparseCode, attach_encoder_gradient


class OneLayer(nn.Module):
    """Every latent reads all r sources and writes all w sources."""

    n_layers: int = 1

    def attach_gradients(
        self,
        code: SparseCode,
        x: Float[Tensor, "b r n"],
        origin: Float[Tensor, "r n"],
        W: Float[Tensor, "f _ n"],
        b_enc: Float[Tensor, " f"] | None,
    ) -> SparseCode:
        """The code with gradients for the encoder that it came from: h = (x - origin) Wᵀ [+ b_enc]."""
        return attach_encoder_gradient(code, x, origin, W, b_enc)

    def encoder_rows(self, W: Float[Tensor, "f _ n"], latents: Int[Tensor, " c"]) -> Float[Tensor, "c r*n"]:
        """The encoder's rows of some latents, over all that an encoder reads."""
        return W.flatten(1).index_select(0, latents)


class CrossLayers(OneLayer):
    """The latents are cut into L equal consecutive parts: those of part l read source l and write the sources l ... L.

    Args:
        n_layers: L; r and w are L too.
        n_latents: f, a multiple of L.
    """

    unwritten: Tensor
    """(f, L, 1) bool: the layers before a latent's own."""

    def __init__(self, n_layers: int, n_latents: int):
        super().__init__()
        self.n_layers, self.n_latents = n_layers, n_latents
        unwritten = torch.arange(n_layers) < self.layer_of(torch.arange(n_latents)).unsqueeze(1)
        self.register_buffer("unwritten", unwritten.unsqueeze(-1), persistent=False)

    def layer_of(self, latents: Int[Tensor, " c"]) -> Int[Tensor, " c"]:
        return latents // (self.n_latents // self.n_layers)

    def attach_gradients(
        self,
        code: SparseCode,
        x: Float[Tensor, "b L n"],
        origin: Float[Tensor, "L n"],
        W: Float[Tensor, "f 1 n"],
        b_enc: Float[Tensor, " f"] | None,
    ) -> SparseCode:
        """Take a row as L rows, one a layer, each with its own input: the entries keep their order."""
        pattern = code.pattern
        place = pattern.rows * self.n_layers + self.layer_of(pattern.latents)
        row_offsets = torch.searchsorted(place, torch.arange(len(x) * self.n_layers + 1, device=place.device))
        by_layer = SparseCode(Pattern(row_offsets, pattern.latents, self.n_latents), code.values)
        attached = attach_encoder_gradient(by_layer, x.flatten(0, 1).unsqueeze(1), origin[:1], W, b_enc)
        return SparseCode(pattern, attached.values)

    def encoder_rows(self, W: Float[Tensor, "f 1 n"], latents: Int[Tensor, " c"]) -> Float[Tensor, "c L*n"]:
        rows = W.new_zeros(len(latents), self.n_layers, W.shape[-1])
        return rows.index_put((torch.arange(len(latents)), self.layer_of(latents)), W[latents, 0]).flatten(1)
