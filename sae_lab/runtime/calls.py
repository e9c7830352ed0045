"""Checks of calls from Python: settings and objects, by the annotations of the function."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from sae_lab.runtime.annotations import NOUNS, describe, is_setting, join_with_or, union_members, validator
from sae_lab.runtime.checks import PLAIN, AnyCallable, checked_by, show
from sae_lab.runtime.errors import SettingError


def check_call(function: AnyCallable) -> AnyCallable:
    """Decorate a function that is called from Python: `check_arguments`, and objects must be of the annotated classes.

        @check_call
        def evaluate_sae(sae: BaseSAE, on: Tensor | LanguageModel, batch_size: Annotated[int, Ge(1)] = 1024): ...

    So must the members of a list and the values of a mapping. Shapes and dtypes of jaxtyping's annotations are not
    checked.
    """
    return checked_by(check_classes, function)


def check_classes(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raise a SettingError for a value that is no object of the classes with which its argument is annotated."""
    hints = get_type_hints(function, include_extras=True)
    for name, value in values.items():
        if name in hints and not is_setting(hints[name]) and not fits(hints[name], value):
            shown = show(value) if isinstance(value, PLAIN) else kind_of(value)
            expected = join_with_or(dict.fromkeys(map(in_words, union_members(hints[name]))))
            raise SettingError(f"{{{name}}} must be {expected}, not {shown}.")


def fits(annotation: Any, value: Any) -> bool:
    """Return whether a value is a setting or an object as annotated; so must be the members of a list or a mapping."""
    if is_setting(annotation):
        return is_valid(annotation, value)
    if len(members := union_members(annotation)) > 1:
        return any(fits(member, value) for member in members)
    cls, inside = class_of(annotation), get_args(annotation)[-1:]
    if not isinstance(cls, type) or cls is Any:
        return True
    if not isinstance(value, cls):
        return False
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    return all(fits(inside[0], child) for child in children) if inside else True


def is_valid(annotation: Any, value: Any) -> bool:
    try:
        validator(annotation)(value)
    except ValueError:
        return False
    return True


def class_of(annotation: Any) -> Any:
    """Return the class of an annotation; that of jaxtyping's Float[Tensor, "b d"] is Tensor."""
    return get_origin(annotation) or getattr(annotation, "array_type", annotation)


def in_words(annotation: Any) -> str:
    """Return what an annotation takes, such as "a Tensor" or "a list of BaseSAE"."""
    if is_setting(annotation):
        return describe(annotation)
    cls, inside = class_of(annotation), get_args(annotation)[-1:]
    name = "list" if cls in (Sequence, Iterable) else cls.__name__
    of = f" of {NOUNS[inside[0]][1] if inside[0] in NOUNS else class_of(inside[0]).__name__}" if inside else ""
    return with_article(name) + of


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"


def kind_of(value: Any) -> str:
    """Return what a value is, without its content."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return with_article(type(value).__name__)
