"""The maths that all SAEs with a linear encoder and a linear decoder share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.ops.auxk import auxk_loss
from sae_lab.ops.matmul import linear_by_part
from sae_lab.ops.sparse import Code
from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.saes.base import BaseSAE, SAEOutput
from sae_lab.saes.dictionary import DictionarySAE
from sae_lab.saes.parts.layers import OneLayer
from sae_lab.saes.parts.mlp import MLP

Widths = Annotated[
    Sequence[Annotated[int, Ge(1)]],
    ErrorMessage("must be a list of positive widths: [512], or [] for no MLP"),
]
"""Of an MLP's hidden layers."""


class Encoder(NamedTuple):
    """h = (inputs - origin) Wᵀ [+ b_enc], with inputs and W flattened from their second axis on."""

    inputs: Float[Tensor, "b r n"]
    origin: Float[Tensor, "r n"]
    W: Float[Tensor, "f _ n"]


class LinearSAE(DictionarySAE):
    """h = (x - b_dec) W_encᵀ [+ b_enc] [+ MLP],   z = activate(h),   x_hat = z W_dec + b_dec

    loss = mean (x - x_hat)² + aux

    At first W_dec is W_enc with its rows at unit norm. A transcoder's h lacks b_dec, which is of other sources than x,
    and its W_enc is drawn by itself. The auxiliary loss gives the dead latents the residual to explain (see auxk.py).

    Args:
        encoder_bias: whether h has b_enc.
        hidden: the widths of the hidden layers of an MLP that adds to h (see parts/mlp.py); empty for none.
        tied: whether W_enc and W_dec are one parameter: both have unit rows, and their gradients add up. A saved SAE
            holds the two of them, equal, so that a reader need not know.
        frozen_decoder: whether W_dec and b_dec stand still, with whatever norms they have: training learns an encoder
            for a given dictionary (`start_from` gives it).
        auxk_coefficient: weight of the auxiliary loss; 0 leaves it out.
        k_aux: how many dead latents may explain one row's residual; None is half its length, s·d / 2, after Gao et al.
            2024, §A.2.
        auxk_selection: whether those are the top k_aux of each `row` or, as the write-up of BatchTopK suggests, the
            top k_aux · b of the `batch`.

    Raises:
        UserError: an unknown word, a number that cannot be, a hidden layer without units, or a decoder both tied and
            frozen.
    """

    def __init__(
        self,
        encoder_bias: bool = False,
        hidden: Widths = (),
        tied: bool = False,
        frozen_decoder: bool = False,
        auxk_coefficient: Annotated[float, Ge(0)] = 0.0,
        k_aux: Annotated[int, Ge(1)] | None = None,
        auxk_selection: Literal["row", "batch"] = "row",
        **dictionary: Any,
    ):
        super().__init__(**dictionary)
        if tied and frozen_decoder:
            raise SettingError("{tied}=true with {frozen_decoder}=true leaves nothing to train: choose one of them.")
        if tied and self.n_inputs:
            raise SettingError(
                "{tied}=true makes W_enc and W_dec one, and a transcoder's are of different sites: give false."
            )
        self.encoder_bias, self.hidden, self.tied, self.frozen_decoder = encoder_bias, [*hidden], tied, frozen_decoder
        self.auxk_coefficient, self.k_aux, self.auxk_selection = auxk_coefficient, k_aux, auxk_selection
        for parameter in (self.W_dec, self.b_dec):
            parameter.requires_grad_(not frozen_decoder)
        self.layers = self.build_layers()
        generator = torch.Generator().manual_seed(self.seed)
        W_enc = self.draw_weights(self.sources.n_written, generator)  # what W_dec was drawn as, so that the two agree
        if self.n_inputs:
            W_enc = self.draw_weights(self.sources.n_read // self.layers.n_layers, generator)
        self.W_enc = self.W_dec if tied else nn.Parameter(W_enc)
        self.b_enc = nn.Parameter(torch.zeros(self.n_latents)) if encoder_bias else None
        self.mlp = MLP(self.sources.n_read * self.d_in, self.hidden, self.n_latents) if self.hidden else None
        if self.mlp is not None:
            self.mlp.initialize(generator)

    def build_layers(self) -> OneLayer:
        """Which of the sources each latent reads and writes."""
        return OneLayer()

    def start_from(self, other: BaseSAE) -> None:
        if self.tied and not other.config.get("tied"):
            raise UserError(
                "an SAE with tied=true cannot start from one whose W_enc and W_dec differ: give tied=false."
            )
        super().start_from(other)

    @abstractmethod
    def activate(self, h: Float[Tensor, "b f"]) -> Code:
        """Pre-activations -> code: what tells the architectures apart."""

    def encoder(self, x: Float[Tensor, "b r d"]) -> Encoder:
        """What h is the product of; an MLP's last layer joins the linear encoder in that one product."""
        origin = self.encoder_center()
        if self.mlp is None:
            return Encoder(x, origin, self.W_enc)
        centred = (x - origin).flatten(1)
        inputs = torch.cat([centred, self.mlp(centred)], dim=1).unsqueeze(1)
        W = torch.cat([self.W_enc.flatten(1), self.mlp.W_out], dim=1).unsqueeze(1)
        return Encoder(inputs, torch.zeros_like(inputs[0]), W)

    def encoder_center(self) -> Float[Tensor, "r d"]:
        """The x whose h is b_enc."""
        return self.b_dec.new_zeros(self.sources.n_read, self.d_in) if self.n_inputs else self.b_dec

    def pre_activations(self, x: Float[Tensor, "b r d"]) -> Float[Tensor, "b f"]:
        """h, from normalised rows."""
        inputs, origin, W = self.encoder(x)
        return linear_by_part((inputs - origin).flatten(1), W.flatten(1), self.b_enc, self.layers.n_layers)

    def encode_normalized(self, x: Float[Tensor, "b r d"]) -> tuple[Code, Float[Tensor, "b f"] | None]:
        h = self.pre_activations(x)
        return self.activate(h), h

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        terms = super().losses(out)
        if self.auxk_coefficient:
            terms["auxk"] = self.auxk_coefficient * self.auxk_loss(out)
        return terms

    def auxk_loss(self, out: SAEOutput) -> Tensor:
        """The auxiliary loss, unweighted; it reaches the dead latents' rows of encoder and decoder, nothing else."""
        dead = self.dead().nonzero().squeeze(-1)
        if len(dead) == 0:
            return out.x_hat.new_zeros(())
        inputs, origin, W = self.encoder(out.x)
        x, residual = (inputs - origin).detach().flatten(1), (out.target - out.x_hat).detach().flatten(1)
        W_enc, W_dec = self.layers.encoder_rows(W, dead), self.W_dec.flatten(1).index_select(0, dead)
        b_enc = None if self.b_enc is None else self.b_enc[dead]
        k_aux = self.sources.n_written * self.d_in // 2 if self.k_aux is None else self.k_aux
        return auxk_loss(x, residual, W_enc, b_enc, W_dec, k_aux, over_batch=self.auxk_selection == "batch")

    def after_step(self) -> None:
        if not self.frozen_decoder:
            super().after_step()
