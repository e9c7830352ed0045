"""A parameter in the precision of products, kept current by what updates it."""

import torch
from torch import Tensor


class Rounded:
    """A copy of W in a lower precision.

    Rounding W before each product reads 4 B and writes 2 B per entry. The kernel that updates W has the new one in
    registers and writes the 2 B alone (adam.py).

    W's version and place tell whether anything else has changed it. Neither fused optimizers nor Triton's kernels raise
    the version, so who calls them says what the copy is afterwards, by `round` or `written`. What is written in place
    through `W.data` is not seen.
    """

    def __init__(self) -> None:
        self.copy: Tensor | None = None
        self._source: tuple[int, int] | None = None

    def of(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W in this dtype, without gradient. The first one that is asked for is kept: graphs may read it."""
        if self.copy is None:
            self.copy = W.detach().to(dtype)
            self.written(W)
        if self.copy.dtype != dtype:
            return W.detach().to(dtype)
        self.refresh(W)
        return self.copy

    def round(self, W: Tensor) -> None:
        """Copy W, if there is a copy."""
        if self.copy is not None:
            self.copy.copy_(W.detach())
            self.written(W)

    def refresh(self, W: Tensor) -> None:
        """Copy W, if there is a copy and W is another one or has changed."""
        if self.copy is not None and self._source != (W._version, W.data_ptr()):
            self.round(W)

    def written(self, W: Tensor) -> None:
        """Note that the copy is current, as after a kernel that has written both."""
        if self.copy is not None:
            self._source = W._version, W.data_ptr()


def rounded(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W in this dtype. A parameter that has a copy (see training/row_adam.py) is not rounded again."""
    kept: Rounded | None = getattr(W, "rounded", None)
    return W.to(dtype) if kept is None or W.dtype == dtype else kept.of(W, dtype)
