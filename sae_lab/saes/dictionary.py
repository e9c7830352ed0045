"""What all SAEs with a linear decoder share, wherever their codes come from."""

import math
from abc import abstractmethod
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_lab.ops import losses, sparse
from sae_lab.ops.matmul import linear
from sae_lab.ops.sparse import Code, SparseCode, fired_latents
from sae_lab.parallel.collectives import on_any_rank
from sae_lab.runtime.errors import SettingError
from sae_lab.saes.base import BaseSAE, Edit, SAEOutput
from sae_lab.saes.parts.normalize import Context, Normalization
from sae_lab.saes.parts.sources import Sources
from sae_lab.saes.parts.unit_norm import divide_by_norm, project_gradient


class DictionarySAE(BaseSAE):
    """x_hat = z W_dec + b_dec [+ x W_skip],   loss = mean (x - x_hat)²

    x is the normalised input; a subclass says what z is. Sums over inputs run over sources and dimensions together, so
    with s > 1 this is a crosscoder. Each row of W_dec has unit norm over (s, d); the part of its gradient that would
    change the norm is removed. How a row's norm is shared out among the sources is free: it tells whose feature the
    latent is. A latent that has not fired in `dead_after` training batches is dead.

    A transcoder reads the first sources of a row, x, and predicts the others, y:

        z = activate(x W_encᵀ [+ b_enc]),   y_hat = z W_dec + b_dec [+ x W_skip],   loss = mean (y - y_hat)² + aux

    Where x is what an MLP reads and y what it writes, latents stand for what the MLP computes, and the weights alone
    tell what makes them active. Any SAE with a linear encoder is one by sae.n_inputs=1 of two sites. Dunefsky,
    Chlenski, Nanda 2024, arXiv 2406.11944; the skip connection, which takes over what is linear in x: Paulo, Shabalin,
    Belrose 2025, arXiv 2501.18823.

    Args:
        d_in: d, the width of an activation.
        n_latents: f, the size of the dictionary.
        n_sources: s.
        n_inputs: how many of them, the first ones, are input alone: x_hat is of the others. 0: every source is both.
        normalize: `per_token`, `none`, `constant_norm` or `mean_norm` (see parts/normalize.py).
        skip: whether a transcoder's x_hat has x W_skip, which starts at zero.
        seed: of the initial weights, drawn by a generator of this SAE's own.
        dead_after: batches without firing after which a latent is dead.
        decoder_norm: which norm of W_dec_i is one, `joint` (sum_s |W_dec_i,s|²)^½ or `sum` sum_s |W_dec_i,s|. It is
            the unit of z_i, hence what selection, thresholds and penalties compare: with a row of norm one, choosing
            by z_i and by z_i · norm_i is the same. Crosscoders of the literature weigh by the sum; with joint, a latent
            of one source alone counts for up to sqrt(s) times more against a shared one. Equal where s is 1.

    Raises:
        UserError: an unknown word, a number that cannot be, no source left to predict, units that depend on the row
            that is predicted, a skip connection without inputs that x_hat is not of.
    """

    batches_since_fired: Tensor
    steps: Tensor
    """Training batches seen."""

    def __init__(
        self,
        d_in: Annotated[int, Ge(1)],
        n_latents: Annotated[int, Ge(1)],
        n_sources: Annotated[int, Ge(1)] = 1,
        n_inputs: Annotated[int, Ge(0)] = 0,
        normalize: Normalization = "per_token",
        skip: bool = False,
        seed: Annotated[int, Ge(0)] = 0,
        dead_after: Annotated[int, Ge(1)] = 5,
        decoder_norm: Literal["joint", "sum"] = "joint",
    ):
        super().__init__()
        if skip and not n_inputs:
            raise SettingError(
                "{skip}=true leads an SAE's input past its latents: it is for transcoders, {n_inputs}=1."
            )
        self.d_in, self.n_latents, self.n_sources, self.n_inputs = d_in, n_latents, n_sources, n_inputs
        self.normalize, self.skip, self.seed = normalize, skip, seed
        self.dead_after, self.decoder_norm = dead_after, decoder_norm
        self.sources = Sources(n_sources, n_inputs, normalize)
        n_read, n_written = self.sources.n_read, self.sources.n_written
        self.W_dec = nn.Parameter(self.draw_weights(n_written, torch.Generator().manual_seed(seed)))
        divide_by_norm(self.W_dec, decoder_norm)
        self.b_dec = nn.Parameter(torch.zeros(n_written, d_in))
        self.W_skip = nn.Parameter(torch.zeros(n_written * d_in, n_read * d_in)) if skip else None
        self.register_buffer("batches_since_fired", torch.zeros(self.n_latents, dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def draw_weights(self, n: int, generator: torch.Generator) -> Float[Tensor, "f n d"]:
        """The write-up's initial weights, for n sources: uniform in ±sqrt(6 / f) (Kaiming)."""
        bound = math.sqrt(6 / self.n_latents)
        return torch.empty(self.n_latents, n, self.d_in).uniform_(-bound, bound, generator=generator)

    @abstractmethod
    def encode_normalized(self, x: Float[Tensor, "b r d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        """Normalised rows -> code, and the pre-activations that it came from where they exist as a whole."""

    def read(self, x: Tensor) -> tuple[Float[Tensor, "b r d"], Context]:
        """Raw activations, of all sources or of the inputs alone -> what is read, and what gives x_hat its units."""
        return self.sources.read(self.as_rows(x, self.sources.n_given(x)))

    def code(self, x: Float[Tensor, "b r d"]) -> Code:
        """Normalised rows -> code, in the form that training and evaluation work with."""
        return self.encode_normalized(x)[0]

    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        rows = self.as_rows(x)
        if self.training:
            self.sources.observe(rows)
        read, target = self.sources(rows)
        code, h = self.encode_normalized(read)
        if self.training:
            self.observe(code)
        return self.output(read, target, code, h)

    def output(
        self, x: Float[Tensor, "b r d"], target: Float[Tensor, "b w d"], code: Code, h: Float[Tensor, "b f"] | None
    ) -> SAEOutput:
        """What `forward` gives, decoded."""
        return SAEOutput(x, target, self.decode_normalized(code, x), code, h)

    def decode_normalized(self, code: Code, x: Float[Tensor, "b r d"]) -> Float[Tensor, "b w d"]:
        """x_hat, normalised, of the code of what was read."""
        return sparse.decode(code, self.W_dec, self.decoder_offset(x))

    def decoder_offset(self, x: Float[Tensor, "b r d"]) -> Float[Tensor, "w d"] | Float[Tensor, "b w d"]:
        """x_hat without a latent."""
        if self.W_skip is None:
            return self.b_dec
        return self.b_dec + linear(x.flatten(1), self.W_skip).unflatten(1, self.b_dec.shape)

    @torch.no_grad()
    def observe(self, code: Code) -> None:
        """Update the state that training keeps, from the code of one training batch."""
        self.batches_since_fired.add_(1).masked_fill_(on_any_rank(fired_latents(code)), 0)
        self.steps += 1

    def dead(self) -> Bool[Tensor, " f"]:
        return self.batches_since_fired >= self.dead_after

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        return {"reconstruction": self.reconstruction(out)}

    def reconstruction(self, out: SAEOutput) -> Tensor:
        """The reconstruction loss."""
        return losses.mse(out.target, out.x_hat)

    def encode(self, x: Tensor) -> Float[Tensor, "b f"]:
        """Raw activations, of a transcoder's inputs alone or of all sources -> code, always as a dense matrix.

        It is for users, who index it, plot it and edit it. Training and evaluation go through `forward` and
        `autoencode`, which keep a sparse code sparse.
        """
        code = self.code(self.read(x)[0])
        return code.to_dense() if isinstance(code, SparseCode) else code

    def decode(self, code: Code) -> Float[Tensor, "b w d"]:
        """x_hat, normalised, without what a skip connection adds."""
        return sparse.decode(code, self.W_dec, self.b_dec)

    def predict(self, x: Tensor, edit: Edit | None = None) -> Float[Tensor, "b w d"]:
        """Raw activations -> x_hat in raw units: of a transcoder's inputs, what it puts in place of the others."""
        return self._predicted(x, edit)[0].to(x.dtype)

    def _predicted(self, x: Tensor, edit: Edit | None) -> tuple[Float[Tensor, "b w d"], Code]:
        read, context = self.read(x)
        code = self.code(read)
        if edit is not None:
            code = edit(code.to_dense() if isinstance(code, SparseCode) else code)
        return self.sources.undo(self.decode_normalized(code, read), context), code

    def autoencode(self, x: Tensor, edit: Edit | None = None) -> tuple[Tensor, Code]:
        rows = self.as_rows(x)
        x_hat, code = self._predicted(rows, edit)
        whole = torch.cat([rows[:, : self.n_inputs], x_hat], dim=1) if self.n_inputs else x_hat
        return whole.view_as(x).to(x.dtype), code

    def predicted_mask(self, x: Float[Tensor, "b s d"]) -> Bool[Tensor, "b s"] | None:
        return self.sources.predicted_mask(x)

    def directions(self) -> Float[Tensor, "f w d"]:
        return self.W_dec.detach()

    def before_step(self) -> None:
        if self.W_dec.grad is not None:
            project_gradient(self.W_dec.grad, self.W_dec, self.decoder_norm)

    def after_step(self) -> None:
        divide_by_norm(self.W_dec, self.decoder_norm)
