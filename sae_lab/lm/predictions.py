"""Next-token logits, computed slice by slice: those of a large vocabulary never exist as a whole."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

ALL = slice(None)


class Predictions(ABC):
    """The predictions of one forward pass over n rows of t tokens.

    Attributes:
        nbytes: memory that it holds until it is dropped.
    """

    nbytes: int

    @abstractmethod
    def logits(self, rows: slice = ALL, positions: slice = ALL) -> Float[Tensor, "r p v"]:
        """Return the logits at a slice of the rows and positions, in the model's dtype."""


class PredictionsOfRows(Predictions):
    """Run the whole model on the rows of each slice: for models whose body is not known.

    Args:
        run: `run(tokens, replace, where)` returns logits.
        tokens, replace, where: as in `LanguageModel.logits`.
    """

    def __init__(
        self,
        run: Callable[..., Float[Tensor, "r t v"]],
        tokens: Int[Tensor, "n t"],
        replace: Float[Tensor, "n t s d"] | None,
        where: Bool[Tensor, "n t s"] | None,
    ):
        self.run, self.arguments = run, (tokens, replace, where)
        self.nbytes = sum(x.nbytes for x in (replace, where) if x is not None)

    def logits(self, rows: slice = ALL, positions: slice = ALL) -> Float[Tensor, "r p v"]:
        return self.run(*(None if x is None else x[rows] for x in self.arguments))[:, positions]


class PredictionsOfHidden(Predictions):
    """Run the body of the model once, and the rest (output embedding, softcapping, scale) on slices of hidden states.

    Args:
        body: the module whose first output is the hidden states that the rest of the model maps to logits.
        run: `run(tokens)` returns logits; it calls `body` once.
        tokens: the rows of token ids.
        output: the output of `body` on them.
    """

    def __init__(
        self,
        body: nn.Module,
        run: Callable[[Int[Tensor, "r p"]], Float[Tensor, "r p v"]],
        tokens: Int[Tensor, "n t"],
        output: Any,
    ):
        self.body, self.run, self.tokens, self.output = body, run, tokens, output
        self.nbytes = output[0].nbytes

    def logits(self, rows: slice = ALL, positions: slice = ALL) -> Float[Tensor, "r p v"]:
        hidden = self.output[0][rows, positions]
        with body_returns(self.body, replace_first(self.output, hidden)):
            return self.run(self.tokens[rows, positions])


class BodyEnded(Exception):
    """Raised inside a forward pass to end it after the model's body."""


def run_body(body: nn.Module, run: Callable[[], Any]) -> Any:
    """Call `run`, a forward pass of the model, until its body ends; return the body's output, or None if not called."""
    seen: list[Any] = []

    def end(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output)
        raise BodyEnded

    handle = body.register_forward_hook(end)
    try:
        with suppress(BodyEnded):
            run()
    finally:
        handle.remove()
    return seen[0] if seen else None


@contextmanager
def body_returns(body: nn.Module, output: Any) -> Iterator[None]:
    """Let the module return `output` instead of running, within the context."""
    own = body.__dict__.get("forward")  # accelerate and nnsight put one there
    body.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


def replace_first(output: Any, new: Tensor) -> Any:
    """Return a module's output, a tuple or a ModelOutput, with its first element replaced."""
    if isinstance(output, tuple):
        return (new, *output[1:])
    output = copy(output)
    output[next(iter(output))] = new
    return output


def cut(n_rows: int, n_positions: int, size: int) -> list[tuple[slice, slice]]:
    """Cut (n, t) into slices (rows, positions) of at most `size` positions: whole rows, if one row is not too large.

    Slices are about equally large, so that memory freed by one fits the next.
    """
    rows = max(1, size // n_positions)
    positions = min(n_positions, max(1, size))
    return [(row, position) for row in parts(n_rows, rows) for position in parts(n_positions, positions)]


def parts(n: int, largest: int) -> list[slice]:
    """Cut n into the fewest parts of at most `largest`, equally large but for the last."""
    size = math.ceil(n / math.ceil(n / largest))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
