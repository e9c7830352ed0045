"""A parameter in the precision of products, kept current by what updates it."""

import torch
from torch import Tensor


class Rounded:
    """A copy of W in a lower precision, and the version of W that it was made from.

    Rounding W before each product reads 4 B and writes 2 B per entry. The kernel that updates W has the new one in
    registers and writes the 2 B alone (adam.py).
    """

    def __init__(self) -> None:
        self.copy: Tensor | None = None
        self._version = 0

    def of(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W in this dtype, and keep it if it is the first one that is asked for: graphs may read the copy."""
        if self.copy is None:
            self.copy = W.detach().to(dtype)
            self.written(W)
        if self.copy.dtype != dtype:
            return W.to(dtype)
        self.refresh(W)
        return self.copy

    def refresh(self, W: Tensor) -> None:
        """Copy W again if anything but `written` has changed it."""
        if self.copy is not None and self._version != W._version:
            self.copy.copy_(W.detach())
            self.written(W)

    def written(self, W: Tensor) -> None:
        """Note that the copy is current, as after a kernel that has written both."""
        self._version = W._version


def rounded(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W in this dtype. A parameter that has a copy (see training/row_adam.py) is not rounded again."""
    kept: Rounded | None = getattr(W, "rounded", None)
    return W.to(dtype) if kept is None or W.dtype == dtype else kept.of(W, dtype)
