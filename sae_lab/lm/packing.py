"""Rows that are one sequence each, which `transformers` need not find out."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def no_packed_sequences(position_ids: Any) -> None:
    """Return what `transformers` returns for rows of one sequence each."""


@contextmanager
def one_sequence_per_row() -> Iterator[None]:
    """Inside the block, `transformers` does not look for several sequences in a row.

    It does so in every forward pass without an attention mask, by the position ids, which are always 0, 1, 2, ... here.
    On a GPU the host then waits until all earlier passes have run (transformers 5, `find_packed_sequence_indices`). The
    activations are the same.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    looks = getattr(masks, "find_packed_sequence_indices", None)
    if looks is not None:
        masks.find_packed_sequence_indices = no_packed_sequences
    try:
        yield
    finally:
        if looks is not None:
            masks.find_packed_sequence_indices = looks
