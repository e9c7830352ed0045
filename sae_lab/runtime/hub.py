"""The Hugging Face hub: how long it may take to answer, and one sentence for whatever goes wrong with it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sae_lab.runtime.errors import UserError, first_line

HUB_TIMEOUT = 5.0
"""Seconds that the hub has to answer before it counts as unreachable."""


@contextmanager
def hub_errors(sentence: str, reason: Callable[[Exception], str] = first_line) -> Iterator[None]:
    """Raise a UserError of this sentence for any exception inside but a UserError.

    Network errors come from whichever HTTP library huggingface_hub uses, so no narrower class can be named.

    Args:
        sentence: what to tell; `{reason}` in it is replaced by the reason.
        reason: an exception's reason, in a line.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(sentence.replace("{reason}", reason(e))) from e
