"""Validation of settings. Each error message says what the value must be."""

import math
from typing import Any

from sae_lab.runtime.errors import UserError


def checked_word(name: str, word: str, *known: str) -> str:
    """Return `word`, the value of the setting `name`, if it is one of the known words.

    Raises:
        UserError: it is not.
    """
    if word not in known:
        raise UserError(f"sae.{name}={word} is not known: choose one of {', '.join(known)}.")
    return word


def checked_number(
    name: str,
    value: Any,
    at_least: float = -math.inf,
    *,
    above: float = -math.inf,
    at_most: float = math.inf,
    whole: bool = False,
    optional: bool = False,
) -> Any:
    """Return `value`, of the setting `name`, if it is a finite number within the bounds, or None if it is optional.

    With `whole`, returns an int (YAML reads 1e3 as a float).

    Raises:
        UserError: it is not, or `whole` is set and it has a fractional part.
    """
    if value is None and optional:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and at_least <= value <= at_most and value > above and not (whole and value != int(value)):
        return int(value) if whole else value
    bounds = {
        "of at least": at_least,
        "above": above,
        "of at most" if math.isinf(max(at_least, above)) else "and at most": at_most,
    }
    wanted = " ".join(f"{words} {bound}" for words, bound in bounds.items() if math.isfinite(bound))
    given = "null" if value is None else value
    number_wanted = f"{'whole ' if whole else ''}number {wanted}".strip()
    raise UserError(f"{name}={given} must be {'null or ' if optional else ''}a {number_wanted}.")


def checked_flag(name: str, value: Any) -> bool:
    """Return `value`, of the setting `name`, if it is true or false.

    Raises:
        UserError: it is not. (Any non-empty string would count as true.)
    """
    if not isinstance(value, bool):
        raise UserError(f"{name}={'null' if value is None else value} must be true or false.")
    return value
