"""Settings checked by the annotations of the function that takes them."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig

from sae_lab.runtime.annotations import describe_mistake, is_setting, validator
from sae_lab.runtime.errors import SettingError

AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])


def check_arguments(function: AnyCallable) -> AnyCallable:
    """Check the settings among the arguments of a function, or of a class's constructor, as their annotations say.

        @check_arguments
        def __init__(self, k_warmup: Annotated[int, Ge(0)] = 0, auxk_selection: Literal["row", "batch"] = "row"): ...

    What annotations mean is said in annotations.py. Arguments of other types, defaults, `*args` and `**kwargs` are left
    alone. A call raises a SettingError where a value does not fit, and Python's own TypeError where an argument is
    unknown or missing.
    """
    if isinstance(function, type):
        function.__init__ = check_arguments(function.__init__)  # type: ignore[misc]
        return function
    signature = inspect.signature(function)
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    single = [name for name, parameter in signature.parameters.items() if parameter.kind not in many]

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # Python says what is wrong
        given.arguments |= check_values(function, {n: v for n, v in given.arguments.items() if n in single})
        return function(*given.args, **given.kwargs)

    return checked  # type: ignore[return-value]


def check_config(cfg: DictConfig, function: Callable[..., Any]) -> None:
    """Check those keys of a config that are settings of a function, and make ints of its whole floats.

    For a check before what takes long, or of settings that no function takes: a TypedDict has annotations as well.

    Raises:
        SettingError: a value does not fit.
    """
    given = {name: cfg[name] for name in settings_of(function) if name in cfg}
    for name, value in check_values(function, given).items():
        if type(value) is not type(given[name]):
            cfg[name] = value


@functools.cache
def settings_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The names and annotations of the settings among a function's arguments."""
    hints = get_type_hints(function, include_extras=True)
    return {name: hint for name, hint in hints.items() if is_setting(hint) and name != "return"}


def check_values(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those values that are settings of the function, as its annotations mean them."""
    settings = settings_of(function)
    return {name: check_value(name, value, settings[name]) for name, value in values.items() if name in settings}


def check_value(name: str, value: Any, annotation: Any) -> Any:
    """The value of the setting `name`, as its annotation means it.

    Raises:
        SettingError: it does not fit.
    """
    try:
        return validator(annotation)(value)
    except ValueError:
        raise SettingError(f"{{{name}}}={show(value)} {describe_mistake(annotation)}.") from None


def show(value: Any) -> str:
    """A value as YAML writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
