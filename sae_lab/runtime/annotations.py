"""An argument's annotation, as a validator of values from YAML and as words.

    Annotated[int, Ge(0)] | None        "null or a whole number of at least 0"
    list[Annotated[float, Gt(0)]]       "a list of numbers above 0"
    Literal["row", "batch"]             "row or batch"

YAML writes 1e3 as a float, so a whole float is an int where the annotation says int. An int stays an int where it says
float. A bool is no number, a string is neither, and a number is finite.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

NOUNS = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), str: ("a string", "strings")}
LISTS = (list, Sequence)
BOUNDS = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}


@dataclass(frozen=True)
class Words:
    """In an Annotated: how the sentence about a wrong value goes on, in place of the words from the annotation."""

    text: str


def is_setting(annotation: Any) -> bool:
    """Whether the annotation is of plain values, which YAML can hold: numbers, strings, flags, null, lists of them."""
    if get_origin(annotation) is Literal:
        return True
    parts = parts_of(annotation)
    return all(map(is_setting, parts)) if parts else annotation in (int, float, bool, str, NoneType)


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """What an Annotated, a union or a list is made of; nothing for another annotation."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return arguments[:1]
    return arguments if origin in (Union, UnionType, *LISTS) else ()


@cache
def validator(annotation: Any) -> Callable[[Any], Any]:
    """A function that returns the value as the annotation means it, or raises a ValueError."""
    from pydantic import TypeAdapter  # here: `--help` needs none of it

    return TypeAdapter(strict(annotation)).validate_python


def strict(annotation: Any) -> Any:
    """The annotation for pydantic, with the rules of this module in place of pydantic's conversions."""
    from pydantic import AllowInfNan, BeforeValidator, Strict

    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return Annotated[(strict(arguments[0]), *arguments[1:])]
    if origin in (Union, UnionType):
        return Union[tuple(map(strict, arguments))]  # noqa: UP007 (of a tuple)
    if origin in LISTS:
        return Annotated[list[strict(arguments[0])], BeforeValidator(as_list)]  # type: ignore[misc]
    if annotation is int:
        return Annotated[int, Strict(), BeforeValidator(as_int)]
    if annotation is float:
        return Annotated[int, Strict()] | Annotated[float, Strict(), AllowInfNan(False)]
    return Annotated[bool, Strict()] if annotation is bool else annotation


def as_int(value: Any) -> Any:
    """1000 for 1e3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_list(value: Any) -> Any:
    """A plain list for a tuple or a list of OmegaConf's."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def describe_mistake(annotation: Any) -> str:
    """How a sentence goes on that begins with a wrong value: "must be ...", or "is not known: choose ..."."""
    if words := metadata(annotation, Words):
        return words[0].text
    options = options_of(annotation)
    if any(get_origin(option) is Literal for option in options):
        return f"is not known: choose {either(name for option in options for name in names_of(option))}"
    return f"must be {either(map(describe, options))}"


def options_of(annotation: Any) -> list[Any]:
    """The members of a union, None first; of another annotation itself."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return sorted(options, key=lambda option: option is not NoneType)


def names_of(option: Any) -> list[str]:
    """The words that an option consists of."""
    if get_origin(option) is Literal:
        return [str(word) for word in get_args(option)]
    return ["true", "false"] if option is bool else [describe(option)]


def describe(option: Any, many: bool = False) -> str:
    """A member of a union, in words: "a whole number of at least 0"."""
    if get_origin(option) in LISTS:
        return f"{'lists' if many else 'a list'} of {describe(get_args(option)[0], many=True)}"
    if get_origin(option) is Annotated:
        return f"{describe(get_args(option)[0], many)} {describe_bounds(option)}"
    if option in NOUNS:
        return NOUNS[option][many]
    return "null" if option is NoneType else "true or false"


def describe_bounds(annotation: Any) -> str:
    """ "of at least 0 and below 1"."""
    bounds = metadata(annotation, *BOUNDS)
    said = [f"{BOUNDS[type(bound)]} {getattr(bound, type(bound).__name__.lower())}" for bound in bounds]
    return f"{'of ' if isinstance(bounds[0], Ge | Le) else ''}{' and '.join(said)}"


def metadata(annotation: Any, *kinds: type) -> list[Any]:
    """What of these kinds an Annotated says."""
    said = get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()
    return [item for item in said if isinstance(item, kinds)]


def either(words: Iterable[str]) -> str:
    """ "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
