"""Plans of training steps in fixed-size mode, from numbers that the host reads one step late."""

from collections import deque
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from sae_lab.runtime.device import Reading
from sae_lab.saes.base import BaseSAE


class Plans:
    """The plans of coming steps.

    At its end each step computes, on the device, what the step after the next must have room for (`BaseSAE.foresee`).
    When the host plans that one, the numbers have arrived, and the step in between is still running. So the device
    always has a step to work on, and never waits for the host or for Lightning's loop.

    A plan changes how a step is rounded. A run that resumes must therefore plan its first step by what the step before
    the last one foresaw, which its checkpoint keeps (`state`, `resume`).

    Args:
        sae: the SAE to train.
    """

    def __init__(self, sae: BaseSAE):
        self.sae = sae
        self._coming: deque[Reading | Mapping[str, int]] = deque()
        """What is known of the next step, and of the one after it."""
        self._names: tuple[str, ...] = ()
        self._versions: list[int] = []

    def next(self) -> Hashable:
        """Plan the next step, by the SAE as it is now where no step has foreseen anything. Returns the plan."""
        if not self._is_current():
            self._coming.clear()
            self.add(self.sae.foresee(0))
            self.add(self.sae.foresee(1))
        return self.sae.plan_step(self._read(self._coming.popleft()))

    def add(self, foreseen: Mapping[str, Tensor]) -> None:
        """Add what a step has foreseen of the step after the next."""
        self._names, self._versions = tuple(foreseen), self._current_versions()
        self._coming.append(Reading(torch.stack(tuple(foreseen.values()))) if foreseen else {})

    def state(self) -> dict[str, int]:
        """Return what is known of the next step; {} if nothing is."""
        return self._read(self._coming[0]) if self._is_current() else {}

    def resume(self, state: Mapping[str, int]) -> None:
        """Continue from a `state`, with the SAE as it was then."""
        self._coming.clear()
        if state:
            self._coming.append(state)
            self.add(self.sae.foresee(1))

    def _read(self, numbers: Reading | Mapping[str, int]) -> dict[str, int]:
        if isinstance(numbers, Mapping):
            return dict(numbers)
        return dict(zip(self._names, numbers.wait(), strict=True))

    def _is_current(self) -> bool:
        """Whether nobody has changed the SAE's counters since the last step, as loading a state does.

        A change through `batches_since_fired.data` is not seen.
        """
        return len(self._coming) == 2 and self._versions == self._current_versions()

    def _current_versions(self) -> list[int]:
        return [buffer._version for buffer in self.sae.buffers()]
