"""The contract of every SAE: what training, evaluation and files rely on, whatever the architecture.

Shapes: b rows (tokens), s sources (sites x models; 1 for a plain SAE), d activation width, f latents.
"""

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae_lab.errors import UserError
from sae_lab.sparse import Code


@dataclass(frozen=True)
class SAEOutput:
    """What a forward pass gives, in the SAE's own (normalised) units."""

    target: Float[Tensor, "b s d"]
    """What x_hat is judged against: the normalised input, or what an SAE makes of it first (s = 1 for a routed row)."""
    x_hat: Float[Tensor, "b s d"]
    code: Code
    h: Float[Tensor, "b f"] | None = None
    """The pre-activations, for losses that need them; None where they never exist as a whole (sparse codes)."""


class BaseSAE(nn.Module, ABC):
    """A dictionary learner over rows of activations `(b, s, d)`; where s is 1, `(b, d)` does as well.

    In `train()` an SAE uses the rule it is trained with (which may look at the whole batch), in `eval()` the rule it
    is deployed with (each row by itself). Only `forward` in train mode changes state, so an evaluation never does,
    under either rule. Every constructor argument is kept as an attribute of the same name: `config` collects them.
    """

    registry: ClassVar[dict[str, type["BaseSAE"]]] = {}
    batch_rule: bool = False
    """Whether the training rule for one row depends on the other rows of its batch."""

    n_sources: int
    d_in: int
    n_latents: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not inspect.isabstract(cls):
            BaseSAE.registry[cls.__name__] = cls

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments: plain types, enough to build this SAE again."""
        names: dict[str, None] = {}
        for cls in type(self).__mro__:
            if cls is BaseSAE:
                break
            parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
            names |= {p.name: None for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, name: str, config: dict[str, Any]) -> "BaseSAE":
        """An untrained SAE of the registered class `name`.

        Raises:
            UserError: no such class (a file can name a class, never import one), or arguments it does not take.
        """
        if name not in cls.registry:
            known = ", ".join(sorted(cls.registry))
            raise UserError(f"there is no SAE class {name!r} among {known}: import the module that defines it first.")
        try:
            return cls.registry[name](**config)
        except TypeError as e:
            raise UserError(f"{name} cannot be built from this config: {e}") from e

    @abstractmethod
    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        """Encode and decode; in train mode also update thresholds and dead-latent counters."""

    @abstractmethod
    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        """The named terms of the training loss, already weighted; their sum is minimised."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "b s d"] | Float[Tensor, "b d"]) -> Code:
        """Raw activations -> code."""

    @abstractmethod
    def decode(self, code: Code) -> Float[Tensor, "b s d"]:
        """Code -> x_hat in the SAE's own (normalised) units."""

    @abstractmethod
    def autoencode(self, x: Float[Tensor, "*row d"]) -> tuple[Float[Tensor, "*row d"], Code]:
        """Raw activations -> (x_hat in raw units, in the shape and dtype of x; code). Changes no state in any mode."""

    @abstractmethod
    def directions(self) -> Float[Tensor, "f s d"]:
        """The dictionary: what one unit of each latent adds to x_hat, in the SAE's own (normalised) units."""

    def reconstruct(self, x: Float[Tensor, "*row d"]) -> Float[Tensor, "*row d"]:
        """Raw activations -> x_hat in raw units, in the shape and dtype of x."""
        return self.autoencode(x)[0]

    def before_step(self) -> None:
        """Between the backward pass and gradient clipping: project gradients."""

    def after_step(self) -> None:
        """After the optimizer's step: put parameters back where constraints want them."""

    def calibrate(self, x: Float[Tensor, "b s d"], i: int) -> None:
        """The i-th batch after training, weights frozen: estimate what inference needs, starting over at i = 0."""

    def dead(self) -> Tensor | None:
        """(f,) bool: which latents count as dead in training; None where nobody counts."""
        return None

    def covers(self, x: Float[Tensor, "b s d"]) -> Bool[Tensor, "b s"] | None:
        """At which sources of each row `reconstruct` says something of its own: it gives x back at the others.

        None where it does at all of them.
        """
        return None

    def rows(self, x: Tensor) -> Float[Tensor, "b s d"]:
        """`(b, d)` or `(b, s, d)` -> `(b, s, d)` in the dtype of the parameters.

        Raises:
            UserError: any other shape.
        """
        y = x.unsqueeze(1) if x.ndim == 2 and self.n_sources == 1 else x
        if y.ndim != 3 or y.shape[1:] != (self.n_sources, self.d_in):
            want = f"(b, {self.n_sources}, {self.d_in})" + (f" or (b, {self.d_in})" if self.n_sources == 1 else "")
            raise UserError(f"this SAE takes activations of shape {want}, not {tuple(x.shape)}.")
        return y.to(next(self.parameters()).dtype)
