"""Plans of training steps in fixed-size mode, from numbers that the host reads one step late."""

from collections import deque
from collections.abc import Hashable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sae_lab.runtime.device import Reading
from sae_lab.saes.base import BaseSAE
from sae_lab.training.python_state import numbers_of_modules


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
        self._coming: deque[Foreseen] = deque()
        """What is known of the next step, and of the one after it."""
        self._versions: list[tuple[int, int]] = []
        self._settings: list[Hashable] = []

    def next(self) -> Hashable:
        """Plan the next step, by the SAE as it is now where no step has foreseen anything. Returns the plan."""
        if not self._is_current():
            self._coming.clear()
            self.add(self.sae.foresee(0))
            self.add(self.sae.foresee(1))
        plan = self.sae.plan_step(self._coming.popleft().wait())
        self._settings = self._current_settings()
        return plan

    def add(self, foreseen: Mapping[str, Tensor]) -> None:
        """Add what a step has foreseen of the step after the next."""
        for buffer in self.sae.buffers():
            increment_version(buffer)  # for other steps of the same SAE: a replay raises no version
        self._versions = self._current_versions()
        self._coming.append(OnTheWay(foreseen))

    def state(self) -> dict[str, int]:
        """Return what is known of the next step; {} if nothing is."""
        return self._coming[0].wait() if self._is_current() else {}

    def resume(self, state: Mapping[str, int]) -> None:
        """Continue from a `state`, with the SAE as it was then."""
        self._coming.clear()
        if state:
            self._coming.append(Known(state))
            self.add(self.sae.foresee(1))
            self._settings = self._current_settings()

    def _is_current(self) -> bool:
        """Whether nobody has changed the SAE's counters and settings since the last step, as loading a state does.

        What is written in place through `batches_since_fired.data` is not seen.
        """
        known = len(self._coming) == 2 and self._versions == self._current_versions()
        return known and self._settings == self._current_settings()

    def _current_settings(self) -> list[Hashable]:
        return numbers_of_modules([*self.sae.modules()])

    def _current_versions(self) -> list[tuple[int, int]]:
        return [(buffer._version, buffer.data_ptr()) for buffer in self.sae.buffers()]


class Foreseen(Protocol):
    """Numbers by which a step is planned."""

    def wait(self) -> dict[str, int]: ...


class OnTheWay:
    """Those that the device computes."""

    def __init__(self, foreseen: Mapping[str, Tensor]):
        self.names = tuple(foreseen)
        self.numbers = Reading(torch.stack(tuple(foreseen.values()))) if foreseen else None

    def wait(self) -> dict[str, int]:
        return {} if self.numbers is None else dict(zip(self.names, self.numbers.wait(), strict=True))


class Known:
    """Those of a checkpoint."""

    def __init__(self, numbers: Mapping[str, int]):
        self.numbers = numbers

    def wait(self) -> dict[str, int]:
        return dict(self.numbers)
