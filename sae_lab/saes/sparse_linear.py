"""Base class of the top-k family: linear SAEs with a selection rule and sparse codes."""

from abc import abstractmethod
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import Self

from sae_lab.ops import losses
from sae_lab.ops.fixed_size import is_fixed_size
from sae_lab.ops.selection import Pieces, Preactivations
from sae_lab.ops.sparse import Code, SparseCode
from sae_lab.parallel.parts import remember
from sae_lab.runtime.errors import SettingError
from sae_lab.saes.base import SAEOutput
from sae_lab.saes.linear import LinearSAE


class SparseLinearSAE(LinearSAE):
    """LinearSAE with sparse codes; a subclass defines which entries of h are kept.

    h is computed in pieces of rows and never held as a whole. After the encoder's product, everything including the
    gradients touches active entries only (see ops/sparse.py).

    With `signed`, the rule keeps the entries of largest |h| with their sign, in place of those of largest relu(h); so
    does the auxiliary loss, and a threshold is one of |h|. A latent then stands for both ends of an axis, such as
    singular and plural, which take two latents otherwise. TopK with signed codes is AbsTopK: Zhu, Khalili, Zhu 2025,
    arXiv 2510.00404.

    Args:
        k: number of active latents per row, or its mean if the rule selects over the whole batch.
        k_warmup: training batches over which k falls linearly from k_start; 0: k from the start. Latents that are
            active early, while many are, have learned a direction by the time when few are.
        k_start: k of the first batch; None: s·d, or f if that is less.
        signed: whether entries are compared by |h| and keep their sign.
        l1_coefficient: weight of a penalty beside the selection, mean_b sum_i |z_i| |W_dec_i|; 0: none. It shrinks the
            values of z. How many are active stays the rule's choice.

    Raises:
        UserError: k or k_start is not between 1 and n_latents, or k_warmup is negative.
    """

    sparse_codes = True

    def __init__(
        self,
        k: float,
        k_warmup: Annotated[int, Ge(0)] = 0,
        k_start: float | None = None,
        auxk_coefficient: Annotated[float, Ge(0)] = 1 / 32,
        signed: bool = False,
        l1_coefficient: Annotated[float, Ge(0)] = 0.0,
        **linear: Any,
    ):
        super().__init__(auxk_coefficient=auxk_coefficient, **linear)
        self.k, self.k_warmup, self.k_start, self.signed = k, k_warmup, k_start, signed
        self.l1_coefficient = l1_coefficient
        self._k_start = min(self.sources.n_written * self.d_in, self.n_latents) if k_start is None else k_start
        check_active(self.n_latents, k=self.k, k_start=self._k_start)
        self.planned_k = self.k

    def foresee(self, ahead: int) -> dict[str, Tensor]:
        return super().foresee(ahead) | ({"steps": self.steps + ahead} if self.k_warmup else {})

    def plan_step(self, foreseen: Mapping[str, int]) -> Hashable:
        """Fix k as well, which changes by the step while it warms up."""
        self.planned_k = self.scheduled_k(foreseen["steps"]) if self.k_warmup else self.k
        return super().plan_step(foreseen), self.planned_k

    @property
    def current_k(self) -> float:
        """k of the current training batch; in `eval()` the final k."""
        if not self.training or not self.k_warmup:
            return self.k
        return self.planned_k if is_fixed_size() else self.scheduled_k(int(self.steps))

    def scheduled_k(self, steps: int) -> float:
        """Return k after as many training batches."""
        return self.k + (self._k_start - self.k) * max(0.0, 1 - steps / self.k_warmup)

    def with_k(self, k: float) -> Self:
        return self.convert_to(type(self), k=k)

    def row_parameters(self) -> dict[nn.Parameter, bool]:
        if self.tied or self.mlp is not None or self.layers.n_layers > 1:
            return {}  # W_enc is W_dec, or multiplies the MLP's output in one product; or rows are masked
        joint = self.decoder_norm == "joint" or self.sources.n_written == 1
        trained = self.W_dec.requires_grad and (joint or not self.unit_norm)
        return ({self.W_dec: self.unit_norm} if trained else {}) | {self.W_enc: False}

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        terms = super().losses(out)
        if self.l1_coefficient:
            assert isinstance(out.code, SparseCode)
            norms = None if self.unit_norm else self.decoder_norms()
            terms["sparsity"] = self.l1_coefficient * losses.l1(out.code, norms)
        return terms

    @abstractmethod
    def select(self, h: Pieces) -> SparseCode:
        """Select a code from pre-activations, given in pieces of rows (see ops/selection.py). Needs no gradient."""

    def encode_normalized(self, x: Float[Tensor, "b r d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        encoder = self.encoder(x)
        with torch.no_grad():
            centered = (encoder.inputs - encoder.center).flatten(1)
            h = Preactivations(centered, encoder.W, self.b_enc, self.layers.sizes)
            code = remember(partial(self.select, h))
        return self.layers.attach_gradients(code, *encoder, self.b_enc), None

    def activate(self, h: Float[Tensor, "b f"]) -> SparseCode:
        with torch.no_grad():
            pattern = self.select([h.detach()]).pattern
        return SparseCode(pattern, h[pattern.rows, pattern.latents])


def check_active(n_latents: int, **numbers: float) -> None:
    """Raise a SettingError unless each of these numbers of active latents is between 1 and n_latents."""
    for name, k in numbers.items():
        if not 1 <= k <= n_latents:
            remedy = f": lower {{{name}}}, or give more latents by n_latents or expansion." if k > n_latents else "."
            raise SettingError(f"{{{name}}}={k} must lie between 1 and the dictionary's {n_latents} latents{remedy}")
