"""The interface of every SAE, on which training, evaluation and files rely.

Shapes: b rows (tokens), s sources (sites x models; 1 for a plain SAE), d activation width, f latents. A transcoder
reads the first r sources and predicts the other w sources; for all other SAEs r = w = s.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import Self

from sae_lab.ops.sparse import Code, SparseCode
from sae_lab.runtime.errors import UserError
from sae_lab.saes.description import describe
from sae_lab.saes.output import SAEOutput
from sae_lab.saes.registry import Registered

AnySAE = TypeVar("AnySAE", bound="BaseSAE")
Edit: TypeAlias = Callable[[Float[Tensor, "b f"]], Float[Tensor, "b f"]]
"""An intervention: maps a dense code to the code that is decoded instead."""


class BaseSAE(Registered, ABC):
    """Sparse autoencoder of activations `(b, s, d)`; if s is 1, `(b, d)` is accepted as well.

    Any number of axes may take the place of b, such as `(n, t, d)` for n texts of t tokens; `encode`, `decode`,
    `predict` and `reconstruct` return the same axes. `sae(x)` and `autoencode` return the rows of codes one after the
    other. If s is 1, `(n, 1, d)` is read as n rows of one source.

    In `train()` mode an SAE uses its training rule, which may look at the whole batch. In `eval()` mode it uses its
    deployed rule, which treats each row by itself. Only `forward` in train mode changes state, so evaluation changes
    none, under either rule.
    """

    batch_rule: bool = False
    """Whether the training rule for a row depends on the other rows of the batch."""
    sparse_codes: bool = False
    """Whether training has codes by active entry (SparseCode), so that no matrix (b, f) but h exists."""
    foldable: bool = False
    """Whether each latent is active or not regardless of the others. Then the units of the code may change, for example
    when the norms of W_dec are folded into it; a rule that compares latents would select different ones."""
    pre_activation_parameters: tuple[str, ...] = ("b_enc",)
    """Names of the parameters (one number per latent) that are added to h or compared with it, in the units of h."""

    resample_every: int = 0
    """Training batches between two calls of `resample` that may do something; 0: it never does."""
    varying_size: str | None = None
    """Why a training step has shapes that depend on data, even in fixed-size mode; None if it has none."""

    shardable: bool = False
    """Whether the latents may be sharded over ranks: all that sums or compares latents does so over all shards, as the
    functions of ops/ do. A class says so of itself alone; a subclass with a rule of its own must say so again."""

    signed: bool = False
    """Whether active latents may be negative. Then the sign of a dictionary row means nothing by itself."""
    reads_previous: bool = False
    """Whether a training batch is (b, 2·s, d): each row, then that of the token before it in the text."""

    n_sources: int
    d_in: int
    n_latents: int
    n_inputs: int = 0
    """The first n_inputs sources are only read, and x_hat predicts the others. 0: all are read and predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(rename_old_tensors)

    def convert_to(self, cls: type[AnySAE], **changes: Any) -> AnySAE:
        """Return an SAE of class `cls` with the parameters and settings of this one.

        `sae.convert_to(TopKSAE, k=8)` is this dictionary under TopK's rule. It shares no memory with this SAE.

        Args:
            cls: the other class. Settings that it does not have are dropped.
            changes: settings to change.

        Raises:
            UserError: `cls` needs a setting that this SAE lacks, or lacks a parameter of this SAE.
        """
        known = cls.arguments()
        config = {name: value for name, value in self.config.items() if name in known} | changes
        other = cls.from_config(config)
        other.start_from(self)
        return other.to(next(self.parameters()).device).train(self.training)

    def with_k(self, k: float) -> Self:
        """Return this SAE with another number of active latents per row. It shares no memory with this SAE.

        A rule over the batch must be calibrated again before it is used in `eval()` mode.

        Raises:
            UserError: k is not possible, or only training can set it.
        """
        raise UserError(f"a {type(self).__name__} cannot take k={k} after training: train it with that L0.")

    def deployed(self) -> "BaseSAE":
        """Return the plainest SAE that encodes and decodes as this one does in `eval()` mode, which exports write."""
        return self

    @torch.no_grad()
    def start_from(self, other: "BaseSAE") -> None:
        """Copy all parameters of `other`, and the buffers that both SAEs have. Everything else stays as it is.

        Raises:
            UserError: a parameter of `other` is missing here or has another shape, or the normalizations differ.
        """
        check_units(self, other)
        check_parameters(self, other)
        own = self.state_dict()
        for name, tensor in other.state_dict().items():
            if name in own:
                own[name].copy_(tensor)

    def restart(self) -> None:
        """Begin training anew from these weights: what depends on the number of training batches starts again."""

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> SAEOutput:
        """Call `forward`, and let its output know this SAE. A training step calls `nn.Module.__call__` instead."""
        return replace(super().__call__(x, *args, **kwargs), sae=self)

    def __repr__(self) -> str:
        return describe(self)

    @abstractmethod
    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        """Encode and decode; in train mode also update thresholds and dead-latent counters."""

    @abstractmethod
    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        """Return the named terms of the training loss, already weighted. Training minimizes their sum."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "*row d"]) -> Float[Tensor, "*b f"]:
        """Map raw activations to a dense code."""

    @abstractmethod
    def decode_rows(self, code: Code) -> Float[Tensor, "b w d"]:
        """Map a code to x_hat, in raw units if these are the same for every row."""

    def decode(self, code: SparseCode | Float[Tensor, "*b f"], x: Float[Tensor, "*row d"] | None = None) -> Tensor:
        """Map a code to x_hat.

        x_hat is in raw units, with one exception: `normalize=per_token` and `constant_norm` scale each row by itself,
        so without `x` it is normalized as the SAE's inputs are.

        Args:
            code: a code of any origin, dense or sparse.
            x: the raw activations that the code stands for. Then x_hat has their units, shape and dtype, and includes
                what an SAE takes from x besides the code: a skip connection, the site of a route.

        Returns:
            `(*b, w, d)`, or the shape of x.
        """
        if x is not None:
            dense = code.to_dense() if isinstance(code, SparseCode) else code
            return self.autoencode(x, lambda z: dense.reshape(z.shape).to(z))[0]
        if isinstance(code, SparseCode):
            return self.decode_rows(code)
        check_tensor(code, "the code")
        x_hat = self.decode_rows(code.reshape(-1, code.shape[-1]))
        return x_hat.view(*code.shape[:-1], *x_hat.shape[1:])

    @abstractmethod
    def autoencode(self, x: Float[Tensor, "*row d"], edit: Edit | None = None) -> tuple[Float[Tensor, "*row d"], Code]:
        """Map raw activations to (x_hat, code), with x_hat in raw units and in the shape and dtype of x.

        Changes no state in any mode.

        Args:
            x: raw activations.
            edit: maps the dense code (b, f) to another one, which is then decoded and returned.
        """

    @abstractmethod
    def directions(self) -> Float[Tensor, "f w d"]:
        """Return the dictionary: what one unit of each latent adds to x_hat, in the SAE's own (normalized) units.

        But for whitening, which is undone: these are directions of activations.
        """

    def reconstruct(self, x: Float[Tensor, "*row d"], edit: Edit | None = None) -> Float[Tensor, "*row d"]:
        """Map raw activations to x_hat in raw units, in the shape and dtype of x.

        `edit` ablates or steers latents: `sae.reconstruct(x, lambda z: z.index_fill(1, latents, 0.0))`. To keep the
        part of x that the SAE does not explain, use x + sae.reconstruct(x, edit) - sae.reconstruct(x).
        """
        return self.autoencode(x)[0] if edit is None else self.autoencode(x, edit)[0]

    def start(self, x: Float[Tensor, "b s d"]) -> None:
        """Measure what the first training batch decides, if that is not done. `forward` does it in train mode.

        Called by itself where a forward pass does not see the whole batch (see training/micro_batches.py).
        """

    def may_resample(self) -> bool:
        """Return whether `resample` may do something at the next batch."""
        return bool(self.resample_every)

    def resample(self, x: Float[Tensor, "b s d"]) -> list[tuple[nn.Parameter, Int[Tensor, " rows"]]]:
        """Reinitialize dead latents if it is time for it. Called before the forward pass of a training batch.

        Returns the changed parameters, each with its changed rows. The optimizer must reset their moments.
        """
        return []

    def foresee(self, ahead: int) -> dict[str, Tensor]:
        """Return the integers by which `plan_step` plans a coming step, as tensors on the SAE's device.

        The only numbers that the host reads of the SAE for a step (see ops/fixed_size.py).

        Args:
            ahead: how many steps come before it. The numbers must then hold whatever the batches of these are.
        """
        return {}

    def plan_step(self, foreseen: Mapping[str, int]) -> Hashable:
        """Fix what determines the shapes of the next training step in fixed-size mode, and return it.

        Steps on equal shapes with equal plans run the same kernels, so one CUDA graph serves all of them.
        """
        return None

    def row_parameters(self) -> dict[nn.Parameter, bool]:
        """Return the parameters whose gradients are sums over the active entries of each latent.

        Each with whether its rows are kept at (joint) unit norm and nothing else is done to their gradients. Training
        on a GPU updates them latent by latent (see training/row_adam.py).
        """
        return {}

    def before_step(self) -> None:
        """Project gradients. Called between the backward pass and gradient clipping."""

    def after_step(self) -> None:
        """Project parameters onto their constraints. Called after the optimizer's step."""

    def calibrate(self, x: Float[Tensor, "b s d"], i: int) -> None:
        """Estimate what inference needs from the i-th batch after training; i = 0 starts over. Weights are frozen."""

    @property
    def own_latents(self) -> range:
        """The latents whose parameters and codes this process holds: all, or one shard (see parallel/shards.py)."""
        return range(self.n_latents)

    def latent_axes(self) -> dict[str, int]:
        """Return the names of the parameters and buffers that have an axis of latents, each with that axis."""
        return {}

    def dead(self) -> Tensor | None:
        """Return which latents count as dead in training, (f,) bool; None if the SAE does not track it."""
        return None

    def reading_directions(self) -> Float[Tensor, "f r d"] | None:
        """Return the encoder's rows, in normalized units; None if the code does not begin with a product with them."""
        return None

    def activation_thresholds(self) -> Float[Tensor, " f"] | None:
        """Return what the absolute value of each active latent exceeds in `eval()` mode; None if no number decides."""
        return None

    def latent_groups(self) -> tuple[str, list[int]] | None:
        """Return what consecutive groups of latents are called, and their sizes; None if all latents are alike."""
        return None

    def predicted_mask(self, x: Float[Tensor, "b s d"]) -> Bool[Tensor, "b s"] | None:
        """Return a mask of the sources that `reconstruct` predicts; the others stay unchanged. None: all predicted."""
        return None

    def as_rows(self, x: Tensor, n_sources: int | None = None) -> Float[Tensor, "b s d"]:
        """Return `(*b, s, d)`, or `(*b, d)` if s is 1, as `(b, s, d)`, in the dtype of the parameters.

        Args:
            x: raw activations.
            n_sources: the expected s; None: all sources of this SAE.

        Raises:
            UserError: x has another shape, or is no tensor of floating-point numbers.
        """
        s = self.n_sources if n_sources is None else n_sources
        check_tensor(x, "activations")
        if not x.is_floating_point():
            raise UserError(f"activations must be floating-point numbers, not {x.dtype}: give x.float().")
        axes = self.leading(x, s)
        rows = x.unsqueeze(-2) if x.ndim == len(axes) + 1 else x
        rows = rows if len(axes) == 1 else rows.reshape(axes.numel(), s, self.d_in)
        return rows.to(next(self.parameters()).dtype)

    def leading(self, x: Tensor, n_sources: int | None = None) -> torch.Size:
        """Return the axes of raw activations that take the place of b. Arguments and errors are those of `as_rows`."""
        check_tensor(x, "activations")
        s = self.n_sources if n_sources is None else n_sources
        if x.ndim > 2 and x.shape[-2:] == (s, self.d_in):
            return x.shape[:-2]
        if s == 1 and x.ndim and x.shape[-1] == self.d_in:
            return x.shape[:-1]
        expected = f"(..., {s}, {self.d_in})" + (f" or (..., {self.d_in})" if s == 1 else "")
        raise UserError(f"activations must have the shape {expected} for this SAE, not {tuple(x.shape)}.")


def check_tensor(x: Any, name: str) -> None:
    """Raise a UserError for an array of another library, or a list."""
    if not isinstance(x, Tensor):
        raise UserError(f"{name} must be a tensor, not a {type(x).__name__}: give torch.as_tensor(x).")


RENAMED = {"normalizer.": "sources.normalizer.", "target_normalizer.": "sources.target_normalizer."}
"""Prefixes of tensor names that earlier versions saved, with the prefixes of today."""


def rename_old_tensors(sae: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename, in place, the tensors that an earlier version saved. Runs before a state dict is loaded."""
    for name in list(state_dict):
        for old, new in RENAMED.items():
            if name.startswith(prefix + old):
                state_dict[prefix + new + name.removeprefix(prefix + old)] = state_dict.pop(name)


def check_sizes(sae: BaseSAE, other: BaseSAE) -> None:
    """Raise a UserError unless both SAEs have the same numbers of sources, inputs, dimensions and latents."""
    for name in ("n_sources", "n_inputs", "d_in", "n_latents"):
        there, here = getattr(other, name), getattr(sae, name)
        if there != here:
            raise UserError(f"an SAE with {name}={there} cannot start one with {name}={here}: make them equal.")


def check_units(sae: BaseSAE, other: BaseSAE) -> None:
    """Raise a UserError if `other` normalizes its input in another way than `sae`.

    A scale that is measured on data is not in the config: it is copied together with the parameters.
    """
    theirs = other.config.get("normalize")
    if theirs != sae.config.get("normalize"):
        raise UserError(f"the parameters of an SAE with normalize={theirs} need sae.normalize={theirs} here as well.")


def whole_shapes(sae: BaseSAE) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of the whole SAE, of which this rank may hold some latents."""
    axes, own = sae.latent_axes(), len(sae.own_latents)
    return {
        name: tuple(n * sae.n_latents // own if i == axes.get(name) else n for i, n in enumerate(parameter.shape))
        for name, parameter in sae.named_parameters(remove_duplicate=False)
    }


def check_parameters(sae: BaseSAE, other: BaseSAE) -> None:
    """Raise a UserError unless `sae` has every parameter of `other`, in the same shape."""
    check_sizes(sae, other)
    shapes = whole_shapes(sae)
    for name, there in whole_shapes(other).items():
        here = shapes.get(name)
        if here != there:
            reason = "has no such parameter" if here is None else f"expects the shape {here}"
            raise UserError(
                f"the parameter {name} {there} of a {type(other).__name__} does not fit this {type(sae).__name__}, "
                f"which {reason}: choose a class and settings that have it, such as sae.encoder_bias=true for b_enc."
            )
