"""What commands that open an SAE share: `sae=`, and `lm=`, `data=` and their keys, which replace the SAE's own."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sae_lab.cli.entry import section_from
from sae_lab.cli.help import conf_file
from sae_lab.runtime.errors import UserError

if TYPE_CHECKING:
    from sae_lab.runs.opening import OpenedSAE

RUN_KEY = re.compile(r"(lm|data)\.[^=]*=")
PLAIN_PATH = re.compile(r"[\w/.,:+~-]*", re.ASCII)
NEXT_PATH = re.compile(r",(?![\w.@+~]+=)(?![^\[]*\])")
"""The comma between two paths of a list. Before a key or in brackets it is in a job's name, as `k=8,lm.sites=[a,b]`."""
LATENTS = re.compile(r"latents=[\d\s,-]*[\s,-][\d\s,-]*")
"""Numbers and ranges without brackets, as the page's search takes them."""


def allow_new_keys(arguments: Sequence[str]) -> list[str]:
    """Let Hydra take what it would refuse: keys of `lm` and `data` that the command's config lacks, and `sae=PATH`.

    `lm.x=1` becomes `++lm.x=1`. `sae=PATH` becomes `run_dir=PATH`, since conf/ has a group `sae`, of training; a path
    with spaces or other characters that Hydra's grammar lacks is quoted, and so are `latents=17, 20-25`.

    Raises:
        UserError: both `sae` and `run_dir` are given.
    """
    if sum(argument.startswith(("sae=", "run_dir=")) for argument in arguments) > 1:
        raise UserError("sae=... and run_dir=... name the same thing: give one of them, once.")
    arguments = [f"run_dir={quoted(a.removeprefix('sae='))}" if a.startswith("sae=") else a for a in arguments]
    arguments = [f'latents="{a.removeprefix("latents=")}"' if LATENTS.fullmatch(a) else a for a in arguments]
    return [f"++{argument}" if RUN_KEY.match(argument) else argument for argument in arguments]


def quoted(path: str) -> str:
    """Return a path, or each path of a list, in quotes if it has letters or signs that Hydra takes only in quotes."""
    if path.startswith("[") and path.endswith("]") and not {"'", '"'} & {*path}:
        return f"[{','.join(quoted(one.strip()) for one in NEXT_PATH.split(path[1:-1]))}]"
    if PLAIN_PATH.fullmatch(path) or path[:1] in ("[", "'", '"', "$"):
        return path
    return "'" + path.replace("'", r"\'") + "'"


def source_from(cfg: DictConfig) -> str:
    """Return what `sae=` or `run_dir=` names: a path, a hub repository or a release.

    Raises:
        UserError: it is missing, or not a string.
    """
    if OmegaConf.is_missing(cfg, "run_dir") or not isinstance(cfg.run_dir, str) or not cfg.run_dir:
        shown = "" if OmegaConf.is_missing(cfg, "run_dir") else cfg.run_dir
        raise UserError(f"sae={shown} must be a run folder, an SAE folder or file, or user/repository on the hub.")
    return cfg.run_dir


def open_from(cfg: DictConfig, **more: Any) -> "OpenedSAE":
    """Open the SAE that the options of a command describe: sae, sae_id, lm, data, device, trust, out.

    Args:
        more: other arguments of `open_sae`.
    """
    from sae_lab.runs.opening import open_sae

    given = {"sae_id": cfg.sae_id, "trust": cfg.trust, "out": cfg.out, "replace": replaced_from(cfg)}
    return open_sae(source_from(cfg), cfg.device, **given, typed=typed_settings(), options=training_options(), **more)


def sources_from(cfg: DictConfig) -> dict[str, tuple[str, str | None]]:
    """Return the SAEs in the list `sae=[...]`, each a source and a sae_id for `load_sae`, by different names.

    Raises:
        UserError: there are fewer than two, one is not there, or as many names or ids are not given.
    """
    from sae_lab.interop.load import find_sae  # imported here, because it imports torch
    from sae_lab.runs.result_folders import distinct_names

    if OmegaConf.is_missing(cfg, "run_dir"):
        raise UserError("sae= has no value: give a list of two SAEs or more, such as 'sae=[outputs/a,outputs/b]'.")
    sources, ids, names = (
        OmegaConf.to_container(cfg[k]) if OmegaConf.is_list(cfg[k]) else cfg[k] for k in ("run_dir", "sae_id", "names")
    )
    if not isinstance(sources, list) or len(sources) < 2:
        raise UserError(f"sae={sources} must be a list of two SAEs or more, such as 'sae=[outputs/a,outputs/b]'.")
    ids = ids if isinstance(ids, list) else [ids] * len(sources)
    pairs = list(zip(map(str, sources), ids, strict=False))
    names = distinct_names(pairs) if names is None else names
    for key, given in (("sae_id", ids), ("names", names)):
        if not isinstance(given, list) or len(given) != len(sources):
            raise UserError(f"{key}={given} must be a list with one entry for each of the {len(sources)} SAEs.")
    if len(set(map(str, names))) < len(names):
        raise UserError(f"names={names} must differ from one another: give each SAE a name of its own.")
    for source, sae_id in pairs:
        find_sae(source, sae_id)
    return dict(zip(map(str, names), pairs, strict=True))


def typed_options(cfg: DictConfig, *keys: str) -> dict[str, Any]:
    """Return those of the options that were typed, with their values."""
    typed = {override.lstrip("+").partition("=")[0] for override in HydraConfig.get().overrides.task}
    return {key: value_of(cfg, key) for key in keys if key in typed}


def typed_settings() -> dict[str, Any]:
    """Return `lm=`, `data=` and their keys as they were typed."""
    split = (override.lstrip("+").partition("=") for override in HydraConfig.get().overrides.task)
    return {key: value for key, _, value in split if key.partition(".")[0] in ("lm", "data")}


def training_options() -> dict[str, Any]:
    """Return the defaults of the top-level options of training, such as seq_len, which data refer to."""
    plain = OmegaConf.to_container(OmegaConf.load(conf_file("train")))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if isinstance(value, int | float)}


def replaced_from(cfg: DictConfig) -> dict[str, Any]:
    """Return the settings below `lm` and `data` that were typed, and those of a choice `data=...`, by their full key.

    Settings of every stream, which a choice has too, count only if they were typed or the run has none.

    Raises:
        UserError: a value stands in the place of `lm` or `data`.
    """
    from sae_lab.runs.folder import flatten  # imported here, because it imports torch
    from sae_lab.runs.replacements import SECTIONS, Default, stream_settings

    typed = {override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task}
    found: dict[str, Any] = {}
    options = training_options()
    for section in SECTIONS:
        node = section_from(cfg, section)
        kept = stream_settings() if section == "data" and "_target_" in node else set()
        for name in map(str, node):
            key = f"{section}.{name}"
            if name not in kept or key in typed:
                found |= flatten(value_of(node, name), key)
            elif OmegaConf.is_interpolation(node, name):  # to an option of `train`
                found[key] = Default(options.get(name))
            else:
                found[key] = Default(value_of(node, name))
    return found


def value_of(node: DictConfig, name: str) -> Any:
    """Return the value of a key as dicts, lists and values, with interpolations resolved."""
    value = node[name]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
