"""Checks of settings, each with a sentence that says what they must be."""

import math
from typing import Any

from sae_lab.runtime.errors import UserError


def checked_word(name: str, word: str, *known: str) -> str:
    """`word`, the value of the setting `name`, if it is one of those known.

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
    """`value`, of the setting `name`, if it is a finite number within these bounds, or null where it is optional.

    A whole number comes back as an int: 1e3 is a float in YAML.

    Raises:
        UserError: it is not, or not whole where it must be.
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
    """`value`, of the setting `name`, if it is true or false.

    Raises:
        UserError: it is not: any word would count as true.
    """
    if not isinstance(value, bool):
        raise UserError(f"{name}={'null' if value is None else value} must be true or false.")
    return value
