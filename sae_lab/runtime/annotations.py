"""Annotations of settings, turned into validators of values from YAML and into words for error messages.

    Annotated[int, Ge(0)] | None        "null or a whole number of at least 0"
    list[Annotated[float, Gt(0)]]       "a list of numbers above 0"
    Literal["row", "batch"]             "row or batch"

YAML reads 1e3 as a float, so a whole float is accepted for int, and converted. An int is accepted for float, and stays
an int. Bools and strings are not numbers, numbers must be finite, and whole numbers must fit into 64 bits, as in torch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

NOUNS: dict[type, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
}
LARGEST = 2**63 - 1
LISTS = (list, Sequence)
BOUNDS = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}


@dataclass(frozen=True)
class ErrorMessage:
    """Metadata of an Annotated: the message about a wrong value, after `key=value`. Replaces the generated message."""

    text: str


def is_setting(annotation: Any) -> bool:
    """Return whether the annotation is of plain values of YAML: numbers, strings, paths, bools, null, lists."""
    if get_origin(annotation) is Literal:
        return True
    parts = parts_of(annotation)
    return all(map(is_setting, parts)) if parts else annotation in (*NOUNS, bool, NoneType)


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """Return the types inside an Annotated, a union or a list; an empty tuple for other annotations."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return arguments[:1]
    return arguments if origin in (Union, UnionType, *LISTS) else ()


@cache
def validator(annotation: Any) -> Callable[[Any], Any]:
    """Return a function that converts a value to the annotated type, or raises a ValueError."""
    from pydantic import TypeAdapter  # imported here, because `--help` does not need it

    return TypeAdapter(strict(annotation)).validate_python


def strict(annotation: Any) -> Any:
    """Return the annotation for pydantic, with the rules of this module instead of pydantic's conversions."""
    from pydantic import AllowInfNan, BeforeValidator, Strict

    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        parts = (strict(arguments[0]), *arguments[1:])
        return Annotated[parts]
    if origin in (Union, UnionType):
        return Union[tuple(map(strict, arguments))]  # noqa: UP007 (X | Y does not work for a tuple)
    if origin in LISTS:
        return Annotated[list[strict(arguments[0])], BeforeValidator(as_list)]  # type: ignore[misc]
    if annotation is int:
        return Annotated[int, Strict(), Ge(-LARGEST), Le(LARGEST), BeforeValidator(as_int)]
    if annotation is float:
        return Annotated[int, Strict(), Ge(-LARGEST), Le(LARGEST)] | Annotated[float, Strict(), AllowInfNan(False)]
    return Annotated[bool, Strict()] if annotation is bool else annotation


def as_int(value: Any) -> Any:
    """Convert a whole float, or an integer of another library, to an int; return other values unchanged."""
    whole = value.is_integer() if isinstance(value, float) else isinstance(value, Integral)
    return int(value) if whole and not isinstance(value, bool) else value


def as_list(value: Any) -> Any:
    """Convert a tuple or a list of OmegaConf to a plain list; return other values unchanged."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def describe_mistake(annotation: Any, value: Any) -> str:
    """Return the message about a wrong value, to follow the value: "must be ...", or "is not known: choose ..."."""
    if is_too_large(annotation, value):
        return f"is too large: a whole number is at most {LARGEST}"
    if messages := metadata(annotation, ErrorMessage):
        return messages[0].text
    members = union_members(annotation)
    if any(get_origin(member) is Literal for member in members):
        return f"is not known: choose {join_with_or(choice for member in members for choice in choices(member))}"
    return f"must be {join_with_or(map(describe, members))}"


def is_too_large(annotation: Any, value: Any) -> bool:
    """Return whether the value is a whole number that only has too many digits."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    takes_int = int in (annotation, *parts_of(annotation)) or any(
        int in parts_of(part) for part in parts_of(annotation)
    )
    return takes_int and number and LARGEST < value < float("inf")


def union_members(annotation: Any) -> list[Any]:
    """Return the members of a union, None first; for another annotation, the annotation itself."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return sorted(members, key=lambda member: member is not NoneType)


def choices(member: Any) -> list[str]:
    """Return the values that a member of a union allows, in words."""
    if get_origin(member) is Literal:
        return [str(value) for value in get_args(member)]
    return ["true", "false"] if member is bool else [describe(member)]


def describe(member: Any, plural: bool = False) -> str:
    """Describe a member of a union in words, such as "a whole number of at least 0"."""
    if get_origin(member) in LISTS:
        return f"{'lists' if plural else 'a list'} of {describe(get_args(member)[0], plural=True)}"
    if get_origin(member) is Annotated:
        return f"{describe(get_args(member)[0], plural)} {describe_bounds(member)}"
    if member in NOUNS:
        return NOUNS[member][plural]
    return "null" if member is NoneType else "true or false"


def describe_bounds(annotation: Any) -> str:
    """Describe the bounds of an Annotated in words, such as "of at least 0 and below 1"."""
    bounds = metadata(annotation, *BOUNDS)
    words = [f"{BOUNDS[type(bound)]} {getattr(bound, type(bound).__name__.lower())}" for bound in bounds]
    return f"{'of ' if isinstance(bounds[0], Ge | Le) else ''}{' and '.join(words)}"


def metadata(annotation: Any, *types: type) -> list[Any]:
    """Return the metadata of an Annotated that are of these types; none for other annotations."""
    items = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return [item for item in items if isinstance(item, types)]


def join_with_or(words: Iterable[str]) -> str:
    """Join words as in "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
