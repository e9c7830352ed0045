"""What all SAEs with a linear decoder share, wherever their codes come from."""

import math
from abc import abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_lab import losses, sparse
from sae_lab.distributed import anywhere
from sae_lab.errors import checked_number, checked_word
from sae_lab.saes.base import BaseSAE, Edit, SAEOutput
from sae_lab.saes.normalize import Context, normalizer
from sae_lab.saes.unit_norm import divide_by_norm, project_gradient
from sae_lab.sparse import Code, SparseCode, fired


class DictionarySAE(BaseSAE):
    """x_hat = z W_dec + b_dec,   loss = mean (x - x_hat)²

    x is the normalised input; a subclass says what z is. Sums over inputs run over sources and dimensions together, so
    with s > 1 this is a crosscoder. Each row of W_dec has unit norm over (s, d); the part of its gradient that would
    change the norm is removed. How a row's norm is shared out among the sources is free: it tells whose feature the
    latent is. A latent that has not fired in `dead_after` training batches is dead.

    Args:
        d_in: d, the width of an activation.
        n_latents: f, the size of the dictionary.
        n_sources: s.
        seed: of the initial weights, drawn by a generator of this SAE's own.
        normalize: `per_token`, `none`, `constant_norm` or `mean_norm` (see saes/normalize.py).
        dead_after: batches without firing after which a latent is dead.
        decoder_norm: which norm of W_dec_i is one, `joint` (sum_s |W_dec_i,s|²)^½ or `sum` sum_s |W_dec_i,s|. It is
            the unit of z_i, hence what selection, thresholds and penalties compare: with a row of norm one, choosing
            by z_i and by z_i · norm_i is the same. Crosscoders of the literature weigh by the sum; with joint, a latent
            of one source alone counts for up to sqrt(s) times more against a shared one. Equal where s is 1.

    Raises:
        UserError: an unknown word, or a number that cannot be.
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
        dead_after: int = 5,
        decoder_norm: str = "joint",
    ):
        super().__init__()
        self.d_in, self.n_latents, self.n_sources, self.normalize = d_in, n_latents, n_sources, normalize
        self.seed = checked_number("sae.seed", seed, 0, whole=True)
        self.dead_after = checked_number("sae.dead_after", dead_after, 1, whole=True)
        self.decoder_norm = checked_word("decoder_norm", decoder_norm, "joint", "sum")
        self.normalizer = normalizer(normalize, n_sources)
        self.W_dec = nn.Parameter(self.drawn(torch.Generator().manual_seed(seed)))
        divide_by_norm(self.W_dec, decoder_norm)
        self.b_dec = nn.Parameter(torch.zeros(n_sources, d_in))
        self.register_buffer("batches_since_fired", torch.zeros(n_latents, dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def drawn(self, generator: torch.Generator) -> Float[Tensor, "f s d"]:
        """The write-up's initial weights: uniform in ±sqrt(6 / f) (Kaiming)."""
        bound = math.sqrt(6 / self.n_latents)
        return torch.empty(self.n_latents, self.n_sources, self.d_in).uniform_(-bound, bound, generator=generator)

    @abstractmethod
    def response(self, x: Float[Tensor, "b s d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        """Normalised rows -> code, and the pre-activations that it came from where they exist as a whole."""

    def code(self, x: Float[Tensor, "b s d"]) -> Code:
        """Normalised rows -> code, in the form that training and evaluation work with."""
        return self.response(x)[0]

    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        rows = self.rows(x)
        if self.training:
            self.normalizer.observe(rows)
        target, _ = self.normalizer(rows)
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
        return {"reconstruction": self.reconstruction(out)}

    def reconstruction(self, out: SAEOutput) -> Tensor:
        """The reconstruction loss."""
        return losses.mse(out.target, out.x_hat)

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

    def autoencode(self, x: Tensor, edit: Edit | None = None) -> tuple[Tensor, Code]:
        target, context = self.normalizer(self.rows(x))
        code = self.code(target)
        if edit is not None:
            code = edit(code.to_dense() if isinstance(code, SparseCode) else code)
        return self.decode(code, context).view_as(x).to(x.dtype), code

    def directions(self) -> Float[Tensor, "f s d"]:
        return self.W_dec.detach()

    def before_step(self) -> None:
        if self.W_dec.grad is not None:
            project_gradient(self.W_dec.grad, self.W_dec, self.decoder_norm)

    def after_step(self) -> None:
        divide_by_norm(self.W_dec, self.decoder_norm)
