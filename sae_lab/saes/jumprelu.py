"""JumpReLU: each latent learns its own threshold."""

from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_lab.ops import losses
from sae_lab.ops.jump_relu import jump_relu, step_frequencies
from sae_lab.ops.mean_l0 import largest_entries, n_active, threshold_of_l0
from sae_lab.parallel.collectives import mean_over_ranks
from sae_lab.parallel.parts import split_rows
from sae_lab.parallel.shards import sum_over_shards
from sae_lab.runtime.errors import SettingError
from sae_lab.saes.base import BaseSAE, SAEOutput
from sae_lab.saes.penalized import PenalizedLinearSAE
from sae_lab.saes.sparse_linear import check_active

THETA, BANDWIDTH = 0.1, 0.1
"""Thresholds of the start and width of the kernel where no batch decides them."""


class JumpReLUSAE(PenalizedLinearSAE):
    """JumpReLU SAE: each latent learns its own threshold theta.

        z       = h · 1[h > theta]
        L0      = mean_b sum_f 1[h > theta]
        penalty = (L0 / k - 1)² (target_l0),   L0 (l0)   or   mean_b sum_f tanh(4 z) (tanh)
        loss    = mean (x - x_hat)² + sparsity_coefficient * penalty + aux
                  [+ frequency_coefficient * sum_f p_f² / frequency_scale]             p_f = mean_b 1[h_f > theta_f]
                  [+ preact_coefficient * mean_b sum_{dead f} relu(theta_f - h_f)]

    The step has no gradient in theta. Training uses the gradient of a step blurred by the kernel R(u) = 1[|u| < 1/2]:

        d z / d theta            = -(theta / bandwidth) R((h - theta) / bandwidth)
        d 1[h > theta] / d theta = -R((h - theta) / bandwidth) / bandwidth

    Both depend on h - theta alone, so the kernel's gradient in h is the negative of that in theta. Rajamanoharan et al.
    leave it out (kernel_gradient=thresholds); Anthropic adds it (all).

    R is applied to h, not to z: z is zero below theta, so half of the window would be empty. The parameter is theta
    itself, at least zero, in float32. As exp(phi) it would hardly move: under Adam by about theta · lr per step. A
    latent that has fallen below the window gets no gradient from these terms, hence the auxiliary loss.

    Rajamanoharan et al. 2024, arXiv 2407.14435 (l0, and target_l0 in an appendix); tanh, preact_coefficient and
    kernel_gradient=all: Conerly et al. 2025 (Anthropic, January 2025); frequency_coefficient: Smith, Rajamanoharan et
    al. 2025 (GDM Mech Interp Team Progress Update #2), and Gemma Scope 2 together with target_l0.
    The default is target_l0, because k then has the same meaning as in a top-k SAE. With the other penalties L0 depends
    on the coefficient, d, f and the scale of the input. As h has a bias b_enc, subtracting b_dec only affects the
    initial state.

    Args:
        k: the mean number of active latents per row that target_l0 aims at; the other penalties ignore it.
        penalty: `target_l0`, `l0` or `tanh`.
        sparsity_coefficient: weight of the penalty. `auto`: COEFFICIENTS[penalty], for inputs of unit std; None: the
            same, but 1 for target_l0, as in runs from before `auto`.
        theta: initial value of all thresholds. None: with target_l0, the value that makes k latents active on a row of
            the first training batch, on average; else 0.1. Adam moves a threshold by about lr per step, while h, a sum
            of d products, moves by up to lr · d: thresholds that start far below h do not catch up in a short run.
        bandwidth: width of R, in units of h. None: half of the thresholds that the first batch gives, so that it suits
            any d and any scale of the input; else 0.1.
        calibrated: whether, after training with target_l0, one factor on all thresholds makes L0 equal to k (see
            `calibrate`).
        kernel_gradient: `thresholds` or `all`: whether the kernel's gradient also reaches h, and so the encoder.
        frequency_coefficient: weight of the penalty on latents that fire often; 0: none.
        frequency_scale: share of rows from which on that penalty weighs more than one on L0.
        preact_coefficient: weight of the loss that pulls dead latents up to their thresholds; 0: none.

    Raises:
        UserError: a setting is unknown or out of range, or target_l0 has no k between 1 and n_latents.
    """

    shardable = True
    pre_activation_parameters = ("b_enc", "thresholds")

    width: Tensor
    """The bandwidth, if it follows from the first batch."""

    # Where L0 settles, the pulls of penalty and reconstruction on the thresholds are equal, so it lies above k by an
    # amount that falls with the coefficient: 7 % with 1 on the bundled model.
    COEFFICIENTS = {"target_l0": 10.0, "l0": 0.005, "tanh": 0.005}

    def __init__(
        self,
        k: float | None = None,
        penalty: Literal["target_l0", "l0", "tanh"] = "target_l0",
        sparsity_coefficient: Annotated[float, Ge(0)] | Literal["auto"] | None = "auto",
        theta: Annotated[float, Ge(0)] | None = None,
        bandwidth: Annotated[float, Gt(0)] | None = None,
        calibrated: bool = True,
        kernel_gradient: Literal["thresholds", "all"] = "thresholds",
        frequency_coefficient: Annotated[float, Ge(0)] = 0.0,
        frequency_scale: Annotated[float, Gt(0)] = 0.1,
        preact_coefficient: Annotated[float, Ge(0)] = 0.0,
        auxk_coefficient: Annotated[float, Ge(0)] = 1 / 32,
        **penalized: Any,
    ):
        super().__init__(auxk_coefficient=auxk_coefficient, **penalized)
        if penalty == "target_l0":
            if k is None:
                raise SettingError("{penalty}=target_l0 needs a k to aim at: give {k}=..., or another penalty.")
            check_active(self.n_latents, k=k)
        self.k, self.penalty, self.sparsity_coefficient = k, penalty, sparsity_coefficient
        self.theta, self.bandwidth, self.kernel_gradient = theta, bandwidth, kernel_gradient
        self.calibrated = calibrated
        self.frequency_coefficient, self.frequency_scale = frequency_coefficient, frequency_scale
        self.preact_coefficient = preact_coefficient
        self.coefficient = self.choose_coefficient()
        self.thresholds = nn.Parameter(torch.full((len(self.own_latents),), THETA if theta is None else float(theta)))
        if bandwidth is None:
            self.register_buffer("width", torch.tensor(BANDWIDTH))
        self.started = False

    def latent_axes(self) -> dict[str, int]:
        return super().latent_axes() | {"thresholds": 0}

    def choose_coefficient(self) -> float:
        given = self.sparsity_coefficient
        if given is None and self.penalty == "target_l0":
            return 1.0
        return self.COEFFICIENTS[self.penalty] if given is None or isinstance(given, str) else given

    def firing_level(self) -> Float[Tensor, " f"]:
        return self.thresholds

    def activation_thresholds(self) -> Float[Tensor, " f"]:
        return self.thresholds.detach()

    def activate(self, h: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        return jump_relu(h, self.thresholds, self.kernel_width(), self.kernel_gradient == "all")

    def kernel_width(self) -> float | Tensor:
        return self.width if self.bandwidth is None else self.bandwidth

    def may_resample(self) -> bool:
        return super().may_resample() or not self.started

    @torch.no_grad()
    def start_from(self, other: BaseSAE) -> None:
        super().start_from(other)
        if "thresholds" in dict(other.named_parameters()):
            self.started = True
        elif (deployed := other.activation_thresholds()) is not None and bool((deployed > 0).all()):
            self.thresholds.copy_(deployed)  # one for all latents; training may start elsewhere, for its own k

    def resample(self, x: Float[Tensor, "b s d"]) -> list[tuple[nn.Parameter, Int[Tensor, " rows"]]]:
        if not self.started:  # asked once: reading the number of steps makes the host wait for the GPU
            if self.theta is None and self.penalty == "target_l0" and int(self.steps) == 0:
                self.start_thresholds(x)
            self.started = True
        return super().resample(x)

    @torch.no_grad()
    def start_thresholds(self, x: Float[Tensor, "b s d"]) -> None:
        """Set all thresholds to one value, with which k latents are active on a row of x on average."""
        assert self.k is not None
        self.start(x)
        read, _ = self.sources(self.as_rows(x))
        n = n_active(self.k, len(read))
        largest = [largest_entries(self.pre_activations(part), n) for part in split_rows(read)]
        if (start := threshold_of_l0(torch.cat(largest), self.k, len(read))) > 0:
            self.thresholds.copy_(start.expand_as(self.thresholds))
            if self.bandwidth is None:
                self.width.copy_(start / 2)

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "b s d"], i: int) -> None:
        """Multiply the thresholds by the factor with which k latents are active on a row, as a mean over batches.

        A latent stays active where h / theta is above the factor, so a batch's factor is the k·b-th largest ratio. The
        running mean of the factors needs no memory, since each ratio already has the mean of before in theta.
        """
        if not self.calibrated or self.k is None or self.penalty != "target_l0":
            return
        h = self.pre_activations(self.read(x)[0])
        factor = threshold_of_l0(h / self.thresholds.clamp_min(1e-12), self.k, len(h))
        self.thresholds.mul_(1 + (factor - 1) / (i + 1))

    def resampled_values(self) -> list[tuple[nn.Parameter, float]]:
        return [*super().resampled_values(), (self.thresholds, THETA if self.theta is None else self.theta)]

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        assert out.h is not None
        penalty = self.compute_penalty(out)  # before the other terms, which parts of a batch then compute once
        terms = super().losses(out) | {"sparsity": self.scale_by_warmup(self.coefficient * penalty)}
        if self.frequency_coefficient:
            frequencies = mean_over_ranks(self.frequencies(out.h))
            penalty = losses.quadratic_frequency(frequencies, self.frequency_scale)
            terms["frequency"] = self.scale_by_warmup(self.frequency_coefficient * penalty)
        if self.preact_coefficient:
            terms["preact"] = self.preact_coefficient * losses.pre_activation(out.h, self.thresholds, self.dead())
        return terms

    def compute_penalty(self, out: SAEOutput) -> Tensor:
        """Compute the penalty, without its coefficient."""
        if self.penalty == "tanh":
            assert isinstance(out.code, Tensor)
            return losses.tanh(self.weigh(out.code.float()))
        assert out.h is not None
        l0 = sum_over_shards(self.frequencies(out.h).sum())
        return l0 if self.k is None or self.penalty == "l0" else (mean_over_ranks(l0) / self.k - 1).square()

    def frequencies(self, h: Float[Tensor, "b f"]) -> Float[Tensor, " f"]:
        """Compute the share of rows on which each latent is active; its sum is L0."""
        return step_frequencies(h, self.thresholds, self.kernel_width(), self.kernel_gradient == "all")

    @torch.no_grad()
    def after_step(self) -> None:
        super().after_step()
        self.thresholds.clamp_min_(0)
