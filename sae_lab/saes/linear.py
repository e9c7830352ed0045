"""The maths that all SAEs with a linear encoder and a linear decoder share."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_lab import losses, sparse
from sae_lab.auxk import auxk
from sae_lab.distributed import anywhere
from sae_lab.errors import UserError, checked_word
from sae_lab.matmul import linear
from sae_lab.saes.base import BaseSAE, SAEOutput
from sae_lab.saes.mlp import MLP, checked_widths
from sae_lab.saes.normalize import Context, normalizer
from sae_lab.saes.unit_norm import divide_by_norm, project_gradient
from sae_lab.sparse import Code, SparseCode, fired


class Encoder(NamedTuple):
    """h = (inputs - origin) Wᵀ [+ b_enc], with inputs and W flattened from their second axis on."""

    inputs: Float[Tensor, "b s n"]
    origin: Float[Tensor, "s n"]
    W: Float[Tensor, "f s n"]


class LinearSAE(BaseSAE):
    """h = (x - b_dec) W_encᵀ [+ b_enc] [+ MLP],   z = activate(h),   x_hat = z W_dec + b_dec

    loss = mean (x - x_hat)² + aux

    x is the normalised input. Sums over inputs run over sources and dimensions together, so with s > 1 this is a
    crosscoder. Each row of W_dec has unit norm over (s, d); the part of its gradient that would change the norm is
    removed. How a row's norm is shared out among the sources is free: it tells whose feature the latent is. A latent
    that has not fired in `dead_after` training batches is dead: the auxiliary loss gives the dead the residual to
    explain (see auxk.py).

    Args:
        d_in: d, the width of an activation.
        n_latents: f, the size of the dictionary.
        n_sources: s.
        seed: of the initial weights, drawn by a generator of this SAE's own.
        normalize: `per_token`, `none` or `constant_norm` (see saes/normalize.py).
        encoder_bias: whether h has b_enc.
        hidden: the widths of the hidden layers of an MLP that adds to h (see saes/mlp.py); empty for none.
        tied: whether W_enc and W_dec are one parameter: both have unit rows, and their gradients add up. A saved SAE
            holds the two of them, equal, so that a reader need not know.
        frozen_decoder: whether W_dec and b_dec stand still, with whatever norms they have: training learns an encoder
            for a given dictionary (`start_from` gives it).
        auxk_coefficient: weight of the auxiliary loss; 0 leaves it out.
        k_aux: how many dead latents may explain one row's residual; None is s·d / 2, after Gao et al. 2024, §A.2.
        auxk_selection: whether those are the top k_aux of each `row` or, as the write-up of BatchTopK suggests, the
            top k_aux · b of the `batch`.
        dead_after: batches without firing after which a latent is dead.
        decoder_norm: which norm of W_dec_i is one, `joint` (sum_s |W_dec_i,s|²)^½ or `sum` sum_s |W_dec_i,s|. It is
            the unit of z_i, hence what selection, thresholds and penalties compare: with a row of norm one, choosing
            by z_i and by z_i · norm_i is the same. Crosscoders of the literature weigh by the sum; with joint, a latent
            of one source alone counts for up to sqrt(s) times more against a shared one. Equal where s is 1.

    Raises:
        UserError: an unknown word, a hidden layer without units, or a decoder both tied and frozen.
    """

    batches_since_fired: Tensor
    steps: Tensor
    """Training batches seen."""

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        n_sources: int = 1,
        seed: int = 0,
        normalize: str = "per_token",
        encoder_bias: bool = False,
        hidden: Sequence[int] = (),
        tied: bool = False,
        frozen_decoder: bool = False,
        auxk_coefficient: float = 0.0,
        k_aux: int | None = None,
        auxk_selection: str = "row",
        dead_after: int = 5,
        decoder_norm: str = "joint",
    ):
        super().__init__()
        self.d_in, self.n_latents, self.n_sources, self.seed = d_in, n_latents, n_sources, seed
        self.normalize, self.encoder_bias, self.hidden = normalize, encoder_bias, checked_widths(hidden)
        self.tied, self.frozen_decoder = tied, frozen_decoder
        if tied and frozen_decoder:
            raise UserError("tied=true with frozen_decoder=true leaves nothing to train: choose one of them.")
        self.auxk_coefficient, self.k_aux, self.dead_after = auxk_coefficient, k_aux, dead_after
        self.auxk_selection = checked_word("auxk_selection", auxk_selection, "row", "batch")
        self.decoder_norm = checked_word("decoder_norm", decoder_norm, "joint", "sum")
        self.normalizer = normalizer(normalize)
        self.W_enc = nn.Parameter(torch.empty(n_latents, n_sources, d_in))
        self.W_dec = (
            self.W_enc if tied else nn.Parameter(torch.empty_like(self.W_enc), requires_grad=not frozen_decoder)
        )
        self.b_dec = nn.Parameter(torch.zeros(n_sources, d_in), requires_grad=not frozen_decoder)
        self.b_enc = nn.Parameter(torch.zeros(n_latents)) if encoder_bias else None
        self.mlp = MLP(n_sources * d_in, self.hidden, n_latents) if self.hidden else None
        self.register_buffer("batches_since_fired", torch.zeros(n_latents, dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """The write-up's: W_enc uniform in ±sqrt(6 / f) (Kaiming), W_dec its rows at unit norm, biases zero."""
        generator = torch.Generator().manual_seed(self.seed)
        bound = math.sqrt(6 / self.n_latents)
        self.W_enc.uniform_(-bound, bound, generator=generator)
        self.W_dec.copy_(self.W_enc)
        divide_by_norm(self.W_dec, self.decoder_norm)
        if self.mlp is not None:
            self.mlp.initialize(generator)

    def start_from(self, other: BaseSAE) -> None:
        theirs = other.config.get("normalize")
        if theirs != self.normalize:
            raise UserError(
                f"the parameters of an SAE with normalize={theirs} want sae.normalize={theirs} here as well."
            )
        if self.tied and not other.config.get("tied"):
            raise UserError(
                "an SAE with tied=true cannot start from one whose W_enc and W_dec differ: give tied=false."
            )
        super().start_from(other)

    @abstractmethod
    def activate(self, h: Float[Tensor, "b f"]) -> Code:
        """Pre-activations -> code: what tells the architectures apart."""

    def encoder(self, x: Float[Tensor, "b s d"]) -> Encoder:
        """What h is the product of; an MLP's last layer joins the linear encoder in that one product."""
        if self.mlp is None:
            return Encoder(x, self.b_dec, self.W_enc)
        centred = (x - self.b_dec).flatten(1)
        inputs = torch.cat([centred, self.mlp(centred)], dim=1).unsqueeze(1)
        W = torch.cat([self.W_enc.flatten(1), self.mlp.W_out], dim=1).unsqueeze(1)
        return Encoder(inputs, torch.zeros_like(inputs[0]), W)

    def preactivation(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b f"]:
        """h, from normalised rows."""
        inputs, origin, W = self.encoder(x)
        return linear((inputs - origin).flatten(1), W.flatten(1), self.b_enc)

    def code(self, x: Float[Tensor, "b s d"]) -> Code:
        """Normalised rows -> code, in the form that training and evaluation work with."""
        return self.response(x)[0]

    def response(self, x: Float[Tensor, "b s d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        """Normalised rows -> code, and the pre-activations that it came from where they exist as a whole."""
        h = self.preactivation(x)
        return self.activate(h), h

    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        target, _ = self.normalizer(self.rows(x))
        code, h = self.response(target)
        if self.training:
            self.observe(code)
        return self.output(target, code, h)

    def output(self, target: Float[Tensor, "b s d"], code: Code, h: Float[Tensor, "b f"] | None) -> SAEOutput:
        """What `forward` gives, decoded."""
        return SAEOutput(target, self.decode(code), code, h)

    @torch.no_grad()
    def observe(self, code: Code) -> None:
        """Update the state that training keeps, from the code of one training batch."""
        self.batches_since_fired.add_(1).masked_fill_(anywhere(fired(code)), 0)
        self.steps += 1

    def dead(self) -> Bool[Tensor, " f"]:
        return self.batches_since_fired >= self.dead_after

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        terms = {"reconstruction": self.reconstruction(out)}
        if self.auxk_coefficient:
            terms["auxk"] = self.auxk_coefficient * self.auxk(out)
        return terms

    def reconstruction(self, out: SAEOutput) -> Tensor:
        """The reconstruction loss."""
        return losses.mse(out.target, out.x_hat)

    def auxk(self, out: SAEOutput) -> Tensor:
        """The auxiliary loss, unweighted; it reaches the dead latents' rows of encoder and decoder, nothing else."""
        dead = self.dead().nonzero().squeeze(-1)
        if len(dead) == 0:
            return out.x_hat.new_zeros(())
        inputs, origin, W = self.encoder(out.target)
        x, residual = (inputs - origin).detach().flatten(1), (out.target - out.x_hat).detach().flatten(1)
        W_enc, W_dec = (V.flatten(1).index_select(0, dead) for V in (W, self.W_dec))
        b_enc = None if self.b_enc is None else self.b_enc[dead]
        k_aux = self.k_aux or self.n_sources * self.d_in // 2
        return auxk(x, residual, W_enc, b_enc, W_dec, k_aux, over_batch=self.auxk_selection == "batch")

    def encode(self, x: Tensor) -> Float[Tensor, "b f"]:
        """Raw activations -> code, always as a dense matrix: for users, who index it, plot it and edit it.

        Training and evaluation go through `forward` and `autoencode`, which keep a sparse code sparse.
        """
        target, _ = self.normalizer(self.rows(x))
        code = self.code(target)
        return code.to_dense() if isinstance(code, SparseCode) else code

    def decode(self, code: Code, context: Context | None = None) -> Float[Tensor, "b s d"]:
        """x_hat, normalised; in raw units where the `context` of the rows' normalisation is given."""
        x_hat = sparse.decode(code, self.W_dec, self.b_dec)
        return x_hat if context is None else self.normalizer.undo(x_hat, context)

    def autoencode(self, x: Tensor) -> tuple[Tensor, Code]:
        target, context = self.normalizer(self.rows(x))
        code = self.code(target)
        return self.decode(code, context).view_as(x).to(x.dtype), code

    def directions(self) -> Float[Tensor, "f s d"]:
        return self.W_dec.detach()

    def before_step(self) -> None:
        if self.W_dec.grad is not None:
            project_gradient(self.W_dec.grad, self.W_dec, self.decoder_norm)

    def after_step(self) -> None:
        if not self.frozen_decoder:
            divide_by_norm(self.W_dec, self.decoder_norm)
