"""Training steps on large batches in the memory of small ones."""

from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae_lab.parallel.gradients import averaged_gradients
from sae_lab.parallel.parts import run_parts, taken_in_parts
from sae_lab.training.step import Splice, StepResult, TrainingStep, Watch


class MicroBatchStep(TrainingStep):
    """TrainingStep that takes a batch in n consecutive parts, and adds up their gradients.

    The step is that of the whole batch, up to rounding: what looks at the batch as a whole, such as a choice among all
    its entries, runs over all parts (see parallel/parts.py), counters and thresholds change once, and the gradient is
    the mean over parts, weighted by their rows. Only one part's activations, pre-activations and codes are in memory at
    a time. A part runs again from its start for each number that it must be told before it can go on; selections of the
    top-k family are not computed again.

    Args:
        step: the step to take in parts.
        n_parts: number of parts.
    """

    def __init__(self, step: TrainingStep, n_parts: int):
        super().__init__(step.sae, step.optimizer, step.max_grad_norm, step.forward)
        self.products, self.scaler, self.n_parts = step.products, step.scaler, n_parts
        self.why_eager = "parts of a batch exchange numbers whose count depends on the data"
        self.started = False

    def __call__(
        self, x: Float[Tensor, "b s d"], splice: Splice | None = None, watch: Watch | None = None
    ) -> StepResult:
        assert splice is None  # see training/options.py
        with taken_in_parts(self.n_parts):
            return super().__call__(x, None, watch)

    def has_fixed_size(self, x: Tensor) -> bool:
        return False

    def run(
        self, x: Float[Tensor, "b s d"], plan: Hashable, splice: Splice | None = None, watch: Watch | None = None
    ) -> StepResult:
        if not self.started:
            self.sae.start(x)
            self.started = True
        self.optimizer.zero_grad()
        parts = x.tensor_split(min(self.n_parts, len(x)))
        state = State(self.sae)
        results = run_parts([*map(len, parts)], partial(self.run_part, x, parts, state, watch))
        with torch.autocast(x.device.type, enabled=False):
            self.update()
        return mean_result(results, [len(part) / len(x) for part in parts])

    def run_part(self, x: Tensor, parts: tuple[Tensor, ...], state: "State", watch: Watch | None, i: int) -> StepResult:
        """Add the gradients of the i-th part. Without the output, and without autograd's graph."""
        state.restore()
        result = self.compute(parts[i]).watched_by(watch)  # waits for other parts, so that the backward pass does not
        last = i == len(parts) - 1
        with averaged_gradients(self.sae.parameters()) if last else nullcontext():
            self.backward(result.loss * (len(parts[i]) / len(x)))
        return replace(result, out=None).detach()


class State:
    """Counters, thresholds and other buffers of an SAE, as they are before a step.

    Every run of a part starts from them, so that the last one leaves what one step on the whole batch does.
    """

    def __init__(self, sae: nn.Module):
        self.buffers = [(buffer, buffer.clone()) for buffer in sae.buffers()]
        self.versions = self.current_versions()

    def current_versions(self) -> list[int]:
        return [buffer._version for buffer, _ in self.buffers]

    def restore(self) -> None:
        """Set the buffers that have changed."""
        now = self.current_versions()
        for (buffer, value), before, version in zip(self.buffers, self.versions, now, strict=True):
            if version != before:
                buffer.copy_(value)
        self.versions = self.current_versions()


def mean_result(results: list[StepResult], weights: list[float]) -> StepResult:
    """Return the terms and the loss of the whole batch, from those of its parts."""

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack([value * weight for value, weight in zip(values, weights, strict=True)]).sum(dim=0)

    terms = {name: mean([result.terms[name] for result in results]) for name in results[0].terms}
    return replace(results[-1], terms=terms, loss=mean([result.loss for result in results]))
