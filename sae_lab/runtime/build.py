"""Objects from the nodes of a config, and what is wrong with them by the keys that the user types."""

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sae_lab.runtime.errors import (
    SettingError,
    UserError,
    argument_error,
    first_line,
    join_keys,
    settings_typed,
    settings_under,
)


def build(cfg: DictConfig, key: str, **arguments: Any) -> Any:
    """Instantiate the node `key` of a config, with more arguments.

    What a node with `_partial_: true` gives tells its errors in the same way when it is called.

    Raises:
        UserError: a setting that cannot be, by the key that the user types; a `_target_` that cannot be imported.
    """
    with settings_typed(typed_keys(cfg)), instantiation_errors():
        built = instantiate(OmegaConf.select(cfg, key), **arguments)
    return guarded(built, cfg, key) if isinstance(built, functools.partial) else built


def guarded(partial: Callable[..., Any], cfg: DictConfig, key: str) -> Callable[..., Any]:
    """The partial that was built from the node `key`, with its errors told by keys."""
    typed = typed_keys(cfg)

    def call(*args: Any, **kwargs: Any) -> Any:
        with settings_typed(typed), settings_under(key):
            try:
                return partial(*args, **kwargs)
            except ValueError as e:  # torch's word for a wrong setting
                raise UserError(f"{key} cannot be built: {first_line(e)}") from e

    return call


@contextmanager
def instantiation_errors() -> Iterator[None]:
    """Raise a user's mistake in place of the InstantiationException that Hydra makes of it; leave others alone."""
    mistake = None
    try:
        yield
    except InstantiationException as e:
        mistake = user_mistake(e)
        if mistake is None:
            raise
    if mistake is not None:
        raise mistake  # not inside `except`: the mistake is what caused e, and its causes would go in a circle


def user_mistake(error: InstantiationException) -> UserError | None:
    """What a user has done wrong, if anything: Hydra's message names the node, its cause what happened there."""
    message = str(error)
    key = found[1] if (found := re.search(r"full_key: (\S+)", message)) else ""
    if target := re.search(r"Error locating target '(.*?)'", message):
        return UserError(f"{join_keys(key, '_target_')}={target[1]} cannot be imported: correct that name.")
    cause = error.__cause__
    mistake = cause if isinstance(cause, UserError) else argument_error(cause) if cause else None
    return mistake.under(key) if isinstance(mistake, SettingError) else mistake


def typed_keys(cfg: DictConfig) -> dict[str, str]:
    """The keys whose value is that of another one, by their names: {"sae.k": "k"} where the config says `k: ${k}`."""
    return dict(interpolations(OmegaConf.to_container(cfg, resolve=False)))


def interpolations(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The keys below a node whose value is one interpolation, and the key that it names."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from interpolations(child, join_keys(key, str(name)))
    elif isinstance(node, str) and (named := re.fullmatch(r"\$\{(\w[\w.]*)\}", node)):
        yield key, named[1]
