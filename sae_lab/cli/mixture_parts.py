"""Fill in the parts of `data=mixture` from conf/data/: {data: fineweb} becomes all settings of that text."""

import difflib
from collections.abc import Mapping
from functools import cache
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf

from sae_lab.cli.help import CONF
from sae_lab.cli.overrides import choices_of, unknown_choice
from sae_lab.runtime.checks import show
from sae_lab.runtime.errors import UserError

WHOLE = "_text"  # the fragment of conf/data/ with the settings that all parts share


def parts_of_mixture(parts: Any) -> Any:
    """Return what `sources` of conf/data/mixture.yaml is, from `parts`: a list or a mapping, as the parts are.

    Raises:
        UserError: a part is not a mapping, its choice is unknown or no text, or it has a key that the choice has not.
    """
    if isinstance(parts, DictConfig):
        return OmegaConf.create({name: fill_in(f"data.parts.{name!s}", part) for name, part in parts.items()})
    if isinstance(parts, ListConfig):
        return OmegaConf.create([fill_in(f"data.parts[{i}]", part) for i, part in enumerate(parts)])
    raise UserError(f"data.parts={shown(parts)} must be a list such as [{{data: stdlib}}, {{data: fineweb}}].")


def fill_in(key: str, part: Any) -> dict[str, Any]:
    """Return the settings of a part, with those that were not typed from conf/data/, as a node that Hydra builds."""
    plain = OmegaConf.to_container(part) if isinstance(part, DictConfig) else None
    typed = {str(name): value for name, value in plain.items()} if isinstance(plain, dict) else {}
    if not isinstance(choice := typed.pop("data", None), str):
        raise UserError(f"{key}={shown(part)} must name its text, such as {{data: text_files, paths: [...]}}.")
    settings = settings_of_choice(key, choice)
    own = {name: value for name, value in settings.items() if name not in composed(WHOLE)}
    for name in typed:
        check_key(key, name, choice, [n for n in own if not n.startswith("_")])
    filled = own | typed
    if missing := [name for name, value in filled.items() if value == "???"]:
        raise UserError(f"{key}.{missing[0]} has no value: type {{data: {choice}, {missing[0]}: ...}}.")
    return {"_target_": filled.pop("_target_"), "_partial_": True} | filled


def settings_of_choice(key: str, choice: str) -> Mapping[str, Any]:
    """Return the settings of conf/data/<choice>.yaml; raise a UserError if there is none, or it is no single text."""
    known = choices_of("data")
    if choice in known and not is_text(choice):
        texts = filter(is_text, known)
        raise UserError(f"{key} cannot be data={choice}: a part must be one of {', '.join(texts)}.")
    try:
        if choice.startswith("_"):
            raise MissingConfigException("a fragment is no choice")
        return composed(choice)
    except MissingConfigException as e:
        raise UserError(f"{key}: {unknown_choice('data', choice, [*filter(is_text, known)])}") from e


def is_text(choice: str) -> bool:
    """Whether a choice of data= is a single text."""
    return composed(WHOLE).keys() <= composed(choice).keys() and "sources" not in composed(choice)


def check_key(key: str, name: str, choice: str, known: list[str]) -> None:
    """Raise a UserError unless a part may have this key."""
    if name in composed(WHOLE):
        raise UserError(f"{key}.{name} belongs to the whole mixture: leave it out, and set data.{name}.")
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? It" if close else "it"
        raise UserError(f"{key} (data={choice}) has no key {name}: {hint} has {', '.join(known)}.")


@cache  # 0.1 s, and a config is resolved several times
def composed(choice: str) -> Mapping[str, Any]:
    """Return conf/data/<choice>.yaml with its defaults, uninterpolated, also from a --config-dir."""
    if GlobalHydra.instance().is_initialized():
        config = hydra.compose(overrides=["+lm=tiny", f"+data={choice}"])  # a choice may have another lm
    else:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            config = hydra.compose(overrides=["+lm=tiny", f"+data={choice}"])
    plain = OmegaConf.to_container(config.data, resolve=False)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def shown(value: Any) -> str:
    return show(value).replace("{{", "{").replace("}}", "}")
