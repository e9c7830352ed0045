"""Adam's steps on W_enc and W_dec, latent by latent, without their gradients in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from sae_lab.ops.adam import adam_step
from sae_lab.ops.rounded import Rounded
from sae_lab.ops.row_gradients import SomeRows, add_rows
from sae_lab.ops.sparse import RowGradient
from sae_lab.saes.base import BaseSAE


class RowAdam:
    """Takes the optimizer's step on the parameters whose gradients are sums over the active entries of each latent.

    The backward pass leaves the factors of such a gradient, and the rows that the auxiliary loss adds, at its parameter
    (`collect`). If nothing else contributes to the gradient, one pass over the parameter forms it, projects it, takes
    Adam's step and restores the norms of its rows (ops/adam.py); otherwise the gradient is formed, and the optimizer
    takes its step as for any parameter (`settle`). Adam's state stays where the optimizer keeps it, so checkpoints do
    not change.

    Only for Adam and AdamW. Not where gradients are clipped, which needs the norm of all gradients first.

    Args:
        sae: the SAE to train. Its `row_parameters` are the candidates.
        optimizer: its optimizer.
    """

    def __init__(self, sae: BaseSAE, optimizer: torch.optim.Optimizer):
        self.optimizer, self.unit_norm = optimizer, sae.row_parameters()
        # Numbers of groups, not groups: loading a checkpoint replaces these.
        self.groups = {
            p: i
            for p in self.unit_norm
            for i, group in enumerate(optimizer.param_groups)
            if p.dtype == torch.float32 and any(p is q for q in group["params"]) and is_plain_adam(optimizer, group)
        }
        self.copies = {p: Rounded() for p in self.groups}

    @contextmanager
    def collect(self, on: bool) -> Iterator[None]:
        """Let backward passes inside the block leave factors of gradients at the parameters, if `on`.

        Forward passes inside it leave parameters rounded for products there, for the next step.
        """
        for parameter in self.groups if on else ():
            parameter.factors, parameter.rounded = [], self.copies[parameter]  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for parameter in self.groups:
                parameter.factors = parameter.rounded = None  # type: ignore[attr-defined]

    def refresh_copies(self) -> None:
        """Round parameters again that were changed between two steps."""
        for parameter, rounded in self.copies.items():
            rounded.refresh(parameter)

    def update_copies(self) -> None:
        """Round the parameters that a step has updated by other means than `step`."""
        for parameter, rounded in self.copies.items():
            if self.is_factored(parameter):
                rounded.refresh(parameter)  # a constraint may have changed it since
            else:
                rounded.round(parameter)

    def tell_others(self) -> None:
        """Raise the versions of the parameters after a step, for other steps of the same SAE that keep copies."""
        for parameter, rounded in self.copies.items():
            increment_version(parameter)
            rounded.written(parameter)

    def drop_copies(self) -> None:
        """Free the memory of rounded parameters."""
        for rounded in self.copies.values():
            rounded.copy = None

    @property
    def copied(self) -> tuple[bool, ...]:
        """Whether steps write each parameter rounded as well."""
        return tuple(rounded.copy is not None for rounded in self.copies.values())

    @staticmethod
    def is_factored(parameter: nn.Parameter) -> bool:
        """Return whether the parameter's gradient is factors, so that `step` updates it."""
        return bool(getattr(parameter, "factors", None))

    def settle(self) -> None:
        """Join the parts of each gradient; form it where something that leaves no factors contributed as well."""
        for parameter in self.groups:
            parts: list[Any] = getattr(parameter, "factors", None) or []
            factors = [part for part in parts if isinstance(part, RowGradient)]
            rows = [part for part in parts if isinstance(part, SomeRows)]
            if parameter.grad is None and len(factors) == 1:
                parts[:] = [reduce(add_rows, rows, factors[0])]
            else:
                for gradient in [*(f.to_dense() for f in factors), *(r.to_dense(len(parameter)) for r in rows)]:
                    add_to_gradient(parameter, gradient)
                parts.clear()

    def step(self) -> None:
        """Take the step of the parameters whose gradients are still factors."""
        for parameter, i in self.groups.items():
            group = self.optimizer.param_groups[i]
            for gradient in getattr(parameter, "factors", None) or []:
                state = adam_state(self.optimizer, parameter)
                state["step"] += 1
                W, m, v = (t.detach().flatten(1) for t in (parameter, state["exp_avg"], state["exp_avg_sq"]))
                rounded = self.copies[parameter]
                adam_step(
                    W,
                    m,
                    v,
                    gradient,
                    lr=torch.as_tensor(group["lr"], device=parameter.device),
                    step=state["step"],
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    decoupled=group.get("decoupled_weight_decay", False),
                    unit_norm=self.unit_norm[parameter],
                    copy=None if rounded.copy is None else rounded.copy.flatten(1),
                )
                rounded.written(parameter)


def is_plain_adam(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Return whether the optimizer's step on a group is the one of ops/adam.py."""
    kinds = (torch.optim.Adam, torch.optim.AdamW)
    return type(optimizer) in kinds and not (group["amsgrad"] or group["maximize"])


def adam_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return Adam's state of a parameter, as Adam makes it before its first step if there is none."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state


def add_to_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to `parameter.grad`."""
    gradient = gradient.view_as(parameter)
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
