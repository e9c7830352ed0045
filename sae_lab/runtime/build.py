"""Build objects from the nodes of a config. Errors name the keys that the user types."""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypedDict

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from sae_lab.runtime.checks import check_config, check_values, settings_of, show
from sae_lab.runtime.errors import (
    SettingError,
    UserError,
    argument_error,
    first_line,
    join_keys,
    report_typed_keys,
    settings_under,
)
from sae_lab.runtime.os_errors import explain_os_error

OURS = "sae_lab."


class Node(TypedDict):
    """The keys of a node that Hydra reads."""

    _target_: str
    _partial_: bool
    _recursive_: bool
    _convert_: Literal["none", "partial", "object", "all"]


def build(cfg: DictConfig, key: str, **arguments: Any) -> Any:
    """Instantiate the node `key` of a config, with additional arguments.

    A function built from a node with `_partial_: true` reports its errors in the same way when it is called.

    Raises:
        UserError: a setting is invalid (named by the key that the user types), a `_target_` cannot be imported, or
            something else stands in the place of the node.
    """
    node = OmegaConf.select(cfg, key, throw_on_missing=True)
    if not isinstance(node, DictConfig) or "_target_" not in node:
        raise SettingError(
            f"{key} must be a part of the config with a {key}._target_, not {show(node)}: leave out the override of "
            f"{key}, and set the keys below it."
        )
    with report_typed_keys(typed_keys(cfg)), raise_user_mistakes():
        check_nodes(node, key)
        built = instantiate(node, **arguments)
    return report_keys_of(built, cfg, key) if isinstance(built, functools.partial) else built


def check_nodes(node: DictConfig, key: str) -> None:
    """Check the keys that Hydra reads, of a node and of those below it."""
    with settings_under(key):
        check_config(node, Node)
    for name in node:
        child = None if OmegaConf.is_missing(node, name) else node[name]
        if isinstance(child, DictConfig):
            check_nodes(child, join_keys(key, str(name)))


def check_settings(cfg: DictConfig, key: str) -> None:
    """Check the settings of the node `key` of a config, and of those below it, that its `_target_` checks.

    `build` does the same. Use this to name a wrong value before something else that it causes.

    Raises:
        SettingError: a value does not fit. It names the full key.
    """
    node = OmegaConf.select(cfg, key)
    if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
        return
    try:
        target = get_object(node["_target_"])
    except (ImportError, ValueError):
        return  # `build` says so
    with settings_under(key):
        seen = set[str]()
        for function in checked_functions(target):
            settings = {n for n in settings_of(function) if n in node and not OmegaConf.is_missing(node, n)} - seen
            check_values(function, {name: node[name] for name in settings})
            seen |= settings
    for name in node:
        check_settings(cfg, join_keys(key, str(name)))


def checked_functions(target: Any) -> list[Callable[..., Any]]:
    """Return the functions whose arguments are checked when the target of a node is called: a class's first."""
    own: list[Any] = [vars(cls).get("__init__") for cls in target.__mro__] if isinstance(target, type) else [target]
    return [function for function in own if hasattr(function, "__wrapped__")]


def report_keys_of(partial: functools.partial, cfg: DictConfig, key: str) -> Callable[..., Any]:
    """Wrap the partial built from the node `key`, so that its errors name the keys that the user types."""
    typed = typed_keys(cfg)

    def call(*args: Any, **kwargs: Any) -> Any:
        with report_typed_keys(typed), settings_under(key):
            try:
                return partial(*args, **kwargs)
            except (TypeError, ValueError) as e:  # torch raises either for an invalid setting
                if isinstance(e, TypeError) and (is_ours(partial.func) or argument_error(e)):
                    raise
                raise UserError(f"{key} cannot be built: {first_line(e)}") from e

    return call


@contextmanager
def raise_user_mistakes() -> Iterator[None]:
    """Raise the user's mistake behind an InstantiationException of Hydra. Other exceptions pass unchanged."""
    mistake = None
    try:
        yield
    except InstantiationException as e:
        mistake = user_mistake(e)
        if mistake is None:
            raise
    if mistake is not None:
        raise mistake  # outside `except`: the mistake caused e, so e must not become the context of the mistake


def user_mistake(error: InstantiationException) -> UserError | None:
    """Return the user's mistake behind an InstantiationException, or None if there is none.

    Hydra's message names the node, and the exception's cause is the error there.
    """
    message = str(error)
    key = found[1] if (found := re.search(r"full_key: (\S+)", message)) else ""
    if target := re.search(r"Error locating target '(.*?)'", message):
        return UserError(f"{join_keys(key, '_target_')}={target[1]} cannot be imported: correct that name.")
    if "Expected a callable target" in message:
        return SettingError("{_target_} must be the full name of a class or a function.").under(key)
    cause = error.__cause__
    if isinstance(cause, OSError) and (refusal := explain_os_error(cause)):
        return UserError(f"{key}: {refusal}")
    mistake = cause if isinstance(cause, UserError) else argument_error(cause) if cause else None
    target = re.search(r"Error in call to target '(.*?)'", message)
    if mistake is None and target and isinstance(cause, TypeError | ValueError) and not target[1].startswith(OURS):
        return UserError(f"{key} cannot be built: {first_line(cause)}")
    return mistake.under(key) if isinstance(mistake, SettingError) else mistake


def is_ours(function: Callable[..., Any]) -> bool:
    """Return whether this package defines the function, whose unexpected errors are bugs and keep their traceback."""
    return str(getattr(function, "__module__", "")).startswith(OURS)


def typed_keys(cfg: DictConfig) -> dict[str, str]:
    """Return the keys that only repeat another key, with that key: {"sae.k": "k"} if `sae` has `k: ${k}`."""
    return dict(interpolations(OmegaConf.to_container(cfg, resolve=False)))


def interpolations(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key below a node that is a single interpolation, with the key it refers to."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from interpolations(child, join_keys(key, str(name)))
    elif isinstance(node, str) and (named := re.fullmatch(r"\$\{(\w[\w.]*)\}", node)):
        yield key, named[1]
