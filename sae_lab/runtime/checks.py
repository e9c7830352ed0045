"""Checks of settings, by the annotations of the function that takes them."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_origin, get_type_hints

from omegaconf import Container, DictConfig, OmegaConf

from sae_lab.runtime.annotations import describe_mistake, is_setting, union_members, validator
from sae_lab.runtime.errors import SettingError

PLAIN = (str, int, float, list, dict, Container, type(None))
AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])


def check_arguments(function: AnyCallable) -> AnyCallable:
    """Decorate a function or a class, so that each call checks its arguments against their annotations.

        @check_arguments
        def __init__(self, k_warmup: Annotated[int, Ge(0)] = 0, auxk_selection: Literal["row", "batch"] = "row"): ...

    annotations.py defines which annotations are checked. An argument annotated with another class only must not be a
    plain value of YAML. Arguments with other annotations, defaults, `*args` and `**kwargs` are not checked. A call
    raises a SettingError if a value does not fit, and Python's own TypeError if an argument is unknown or missing.
    """
    if isinstance(function, type):
        function.__init__ = check_arguments(function.__init__)  # type: ignore[misc]
        return function
    return checked_by(check_objects, function)


def checked_by(check: Callable[..., None], function: AnyCallable) -> AnyCallable:
    """Return a function whose calls check their objects by `check`, and their settings."""
    signature = inspect.signature(function)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, parameter in signature.parameters.items() if parameter.kind not in variadic]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # raises Python's own TypeError
        values = {n: v for n, v in given.arguments.items() if n in names}
        check(function, values)
        given.arguments |= check_values(function, values)
        return function(*given.args, **given.kwargs)

    return checked  # type: ignore[return-value]


def check_config(cfg: DictConfig, function: Callable[..., Any]) -> None:
    """Check the keys of a config that are settings of `function`. Whole floats become ints, in place, where expected.

    Use it to check settings before slow work, or settings that no function takes: `function` may be a TypedDict.

    Raises:
        SettingError: a value does not fit.
    """
    given = {name: cfg[name] for name in settings_of(function) if name in cfg}
    for name, value in check_values(function, given).items():
        if type(value) is not type(given[name]):
            cfg[name] = value


@functools.cache
def settings_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments of a function that are settings (see `is_setting`): their names and annotations."""
    hints = get_type_hints(function, include_extras=True)
    return {name: hint for name, hint in hints.items() if is_setting(hint) and name != "return"}


def check_values(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the values that are settings of the function, and return them converted to their annotated types."""
    settings = settings_of(function)
    return {name: check_value(name, value, settings[name]) for name, value in values.items() if name in settings}


def check_objects(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raise a SettingError for a plain value of YAML where the function takes an object of a class, or a function."""
    for name, classes in classes_of(function).items():
        if name in values and isinstance(values[name], PLAIN) and not isinstance(values[name], classes):
            raise SettingError(
                f"{{{name}}}={show(values[name])} must be a part of the config with a {{{name}}}._target_: leave out "
                f"this override, and set the keys below {{{name}}}."
            )


@functools.cache
def classes_of(function: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """Return the arguments of a function that are objects or functions, never settings: their names and classes."""
    hints = {name: union_members(hint) for name, hint in get_type_hints(function).items() if name != "return"}
    classes = {name: [get_origin(member) or member for member in members] for name, members in hints.items()}
    return {
        name: tuple(classes[name])
        for name, members in hints.items()
        if all(isinstance(cls, type) and cls is not Any for cls in classes[name]) and not any(map(is_setting, members))
    }


def check_value(name: str, value: Any, annotation: Any) -> Any:
    """Return the value of the setting `name`, converted to its annotated type.

    Raises:
        SettingError: the value does not fit.
    """
    try:
        return validator(annotation)(value)
    except ValueError:
        raise SettingError(f"{{{name}}}={show(value)} {describe_mistake(annotation, value)}.") from None


def show(value: Any) -> str:
    """Return a value as YAML writes it, on one line of at most 100 characters, for the sentence of a SettingError."""
    text = " ".join(written(value).split()) or "''"
    return (text if len(text) <= 100 else f"{text[:97]}...").replace("{", "{{").replace("}", "}}")


def written(value: Any) -> str:
    """Return a value as YAML writes it."""
    if isinstance(value, Container):
        value = OmegaConf.to_container(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {written(child)}' for key, child in value.items())}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(written, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
