"""The Hugging Face hub: a time limit, and one error message for everything that can go wrong."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sae_lab.runtime.errors import UserError, first_line

HUB_TIMEOUT = 5.0
"""Seconds without an answer after which the hub counts as unreachable."""


@contextmanager
def hub_errors(sentence: str, reason: Callable[[Exception], str] = first_line) -> Iterator[None]:
    """Turn every exception inside the block into a UserError. A UserError passes unchanged.

    All exceptions are caught, because network errors come from the HTTP library that huggingface_hub happens to use.

    Args:
        sentence: the error message; `{reason}` in it is replaced.
        reason: returns the reason of an exception, in one line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(sentence.replace("{reason}", reason(e))) from e
