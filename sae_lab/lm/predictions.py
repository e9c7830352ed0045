"""Next-token logits, computed slice by slice: those of a large vocabulary never exist as a whole."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

LM: TypeAlias = Any
"""A LanguageModel, whose file imports this one."""
ALL = slice(None)
SLICE_BYTES = 2**26
"""Size of one float32 copy of a slice's logits. Also bounds the hidden states that an evaluation holds at once."""
Loss: TypeAlias = Callable[[Float[Tensor, "r p v"], tuple[slice, slice]], Float[Tensor, ""]]


class Predictions(ABC):
    """The predictions of one forward pass over n rows of t tokens.

    Attributes:
        nbytes: memory that it holds until it is dropped.
    """

    nbytes: int

    @abstractmethod
    def logits(self, rows: slice = ALL, positions: slice = ALL) -> Float[Tensor, "r p v"]:
        """Return the logits at a slice of the rows and positions, in the model's dtype."""

    @property
    @abstractmethod
    def source(self) -> Tensor:
        """What `logits` starts from, with autograd's graph back to what replaced the activations."""

    @abstractmethod
    def from_source(self, source: Tensor) -> "Predictions":
        """Return the predictions that start from `source` instead."""

    def backward(self, loss: Loss, pieces: Iterable[tuple[slice, slice]]) -> Float[Tensor, ""]:
        """Add the gradient of the sum of `loss` over slices to what replaced the activations. Returns the sum.

        The graph of one slice's logits exists at a time. Then one backward pass goes through the rest of the model.

        Args:
            loss: maps the logits of a slice, and the slice, to a scalar.
            pieces: slices (rows, positions); see `cut`.
        """
        leaf = self.source.detach().requires_grad_()
        predictions, total = self.from_source(leaf), torch.zeros((), device=leaf.device)
        for piece in pieces:
            value = loss(predictions.logits(*piece), piece)
            value.backward()
            total += value.detach()
        self.source.backward(leaf.grad)
        return total


class PredictionsOfRows(Predictions):
    """Run the whole model on the rows of each slice: for models whose body is not known.

    Args:
        lm: the language model.
        tokens, replace, where: as in `LanguageModel.logits`.
    """

    def __init__(
        self,
        lm: LM,
        tokens: Int[Tensor, "n t"],
        replace: Float[Tensor, "n t s d"] | None,
        where: Bool[Tensor, "n t s"] | None,
    ):
        self.lm, self.arguments = lm, (tokens, replace, where)
        self.nbytes = sum(x.nbytes for x in (replace, where) if x is not None)

    def logits(self, rows: slice = ALL, positions: slice = ALL) -> Float[Tensor, "r p v"]:
        return self.lm.logits(*(None if x is None else x[rows] for x in self.arguments))[:, positions]

    @property
    def source(self) -> Float[Tensor, "n t s d"]:
        assert self.arguments[1] is not None
        return self.arguments[1]

    def from_source(self, source: Float[Tensor, "n t s d"]) -> "PredictionsOfRows":
        tokens, _, where = self.arguments
        return PredictionsOfRows(self.lm, tokens, source, where)


class PredictionsOfHidden(Predictions):
    """Run the body of the model once, and the rest (output embedding, softcapping, scale) on slices of hidden states.

    Args:
        lm: a language model that `is_split` at its body.
        tokens, replace, where: as in `LanguageModel.logits`.
    """

    def __init__(
        self,
        lm: LM,
        tokens: Int[Tensor, "n t"],
        replace: Float[Tensor, "n t s d"] | None,
        where: Bool[Tensor, "n t s"] | None,
    ):
        assert lm.body is not None
        self.lm, self.body, self.tokens = lm, lm.body, tokens
        self.output = run_body(lm.body, lambda: lm.logits(tokens, replace, where))
        self.nbytes = self.output[0].nbytes

    def logits(self, rows: slice = ALL, positions: slice = ALL) -> Float[Tensor, "r p v"]:
        hidden = self.output[0][rows, positions]
        with body_returns(self.body, replace_first(self.output, hidden)):
            return self.lm.logits(self.tokens[rows, positions])

    @property
    def source(self) -> Float[Tensor, "n t h"]:
        return self.output[0]

    def from_source(self, source: Float[Tensor, "n t h"]) -> "PredictionsOfHidden":
        other = copy(self)
        other.output = replace_first(self.output, source)
        return other


@torch.no_grad()
def is_split(lm: LM, body: nn.Module) -> bool:
    """Whether the body alone, then the rest on slices, compute the logits of a forward pass with replaced sites.

    Tried out on one row: some models have more between body and logits, and a site may lie behind the body.
    """
    tokens = torch.arange(min(4, lm.context or 4)).unsqueeze(0) % lm.vocab_size
    if not isinstance(run_body(body, lambda: lm.logits(tokens)), tuple | Mapping):  # a ModelOutput is a mapping
        return False
    replace = lm.activations(tokens) / 2
    whole, split = lm.logits(tokens, replace), PredictionsOfHidden(lm, tokens, replace, None)
    sliced = torch.cat([split.logits(positions=part) for part in (slice(0, 1), slice(1, None))], dim=1)
    tolerance = max(1e-3, 4 * torch.finfo(whole.dtype).eps) * whole.abs().max().item()
    return torch.allclose(sliced, whole, rtol=0, atol=tolerance)


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


def logit_slices(tokens: Int[Tensor, "n t"], vocab_size: int) -> list[tuple[slice, slice]]:
    """Cut the predictions of a pass into slices (rows, positions) of at most SLICE_BYTES of float32 logits."""
    return cut(len(tokens), tokens.shape[1], SLICE_BYTES // (4 * vocab_size))


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
