"""What leaves the machine (reports, cards, exports, provenance, W&B): no secrets, no values of the environment, no
folders of this machine.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from sae_lab.runtime.errors import join_keys

HIDDEN = "(hidden)"

SECRET_NAME = re.compile(
    # `n_tokens`, `tokenizer` and `token_ids` are no secrets, nor are `per_token` and a tokenizer's `bos_token`.
    r"(?<!per_)(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)token(?!s|i[sz]|_?id)"
    r"|passw|passphrase|secret|credential|authorization|(?:api|access|private|auth|account)[_-]?key",
    re.IGNORECASE,
)
"""Found in the name of a setting that holds a secret."""

SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[\w-]{16,}|\bsk_(?:live|test)_\w{8,}"  # OpenAI, Anthropic, Stripe
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|wandb_v\d_\w{16,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{12,}"  # AWS: the id of a key, and a key
    r"|(?<![\w/+])(?=[\w/+]{0,39}[a-z])(?=[\w/+]{0,39}[A-Z])(?=[\w/+]{0,39}\d)[A-Za-z0-9/+]{40}(?![\w/+=])"
    r"|AIza[\w-]{30,}|xox[abprs]-[\w-]{10,}"  # Google, Slack
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)
HEX_KEY = re.compile(r"((?:commit|revision|sha|digest|hash)\w*['\"]?[=:] ?['\"]?)?\b[0-9a-f]{40}\b")
"""A key of W&B or, if group 1 says so, the name of a version."""

USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
NAMED = re.compile(r"([\w.@/+-]+)([=:] ?)([^\s,&;'\"\]})]+)")
"""A setting in a text: `lm.token=abc`, `password: abc`, `?sig=abc`."""

PATH = re.compile(r"(?<![\w.:/~)\]}>%$*])(?:file://)?(?:~[\w.-]*|\.\.)?/(?!/)[^\s'\"`,;:()\[\]{}<>|=]+")
"""A path in a text that starts at the root, at a home folder or above the working directory."""


def public(value: Any, from_environment: Collection[str] = (), key: str = "") -> Any:
    """Return settings as they may leave the machine: nested dicts and lists, with what is private replaced.

    Args:
        from_environment: keys whose values came from the environment (`keys_from_environment`). Their strings are
            hidden; numbers are shown, because they are what an experiment is made of.
        key: the key of `value` itself.
    """
    if SECRET_NAME.search(key.rpartition(".")[2]):
        return value if value is None or isinstance(value, bool) else HIDDEN
    if key and key in from_environment:
        return hide_strings(value)
    if isinstance(value, dict):
        return {name: public(child, from_environment, join_keys(key, str(name))) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [public(child, from_environment, f"{key}[{i}]") for i, child in enumerate(value)]
    return public_setting(value, key) if isinstance(value, str) else value


def public_setting(value: str, key: str = "") -> str:
    """Return a setting that is a string. One that begins like a path is a path as a whole, with spaces."""
    if value.startswith(("/", "~", "../", "file:///")) and "\n" not in value:
        return public_path(hide_secrets(value, key))
    return public_text(value, key=key)


def public_text(text: str, values: Iterable[str] = (), key: str = "") -> str:
    """Return a sentence or a name without secrets, without folders, and without `values` (private_values)."""
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return PATH.sub(lambda path: public_path(path[0]), hide_secrets(text, key))


def public_path(path: str) -> str:
    """Return a path relative to the working directory if it lies inside it, else its last part.

    What is lost is the folder. It is still in the config of the run, which stays where the run is.
    """
    full = Path(os.path.abspath(os.path.expanduser(path.removeprefix("file://"))))  # noqa: PTH100, PTH111 (no links)
    here = Path.cwd()
    if here != Path(here.root) and full.is_relative_to(here):
        inside = full.relative_to(here).as_posix()
        if not tells_of_user(inside):
            return inside
    return HIDDEN if tells_of_user(full.name) else full.name


def tells_of_user(text: str) -> bool:
    """Return whether a text holds the name of the login or of the home folder as a word."""
    home = Path(os.path.expanduser("~")).name  # noqa: PTH111 (does not raise where there is no home)
    names = {os.environ.get("LOGNAME", ""), os.environ.get("USER", ""), home} - {""}
    return any(re.search(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", text) for name in names)


def hide_secrets(text: str, key: str = "") -> str:
    """Replace what looks like a secret: tokens, keys, users and passwords in URLs, values of settings so named."""
    text = USER_IN_URL.sub(f"{HIDDEN}@", SECRETS.sub(HIDDEN, text))
    text = NAMED.sub(_hide_named, text)
    prefix = f"{key}="  # a commit is known by its key
    return HEX_KEY.sub(lambda found: found[0] if found[1] else HIDDEN, prefix + text).removeprefix(prefix)


def _hide_named(found: re.Match[str]) -> str:
    name, sign, value = found.groups()
    signature = sign == "=" and re.search(r"(?i)(?:^|[_-])sig(?:nature)?$", name)
    is_secret = (SECRET_NAME.search(name) or signature) and value not in ("null", "None", "true", "false")
    return f"{name}{sign}{HIDDEN}" if is_secret else found[0]


def hide_strings(value: Any) -> Any:
    """Replace every string at or below a value."""
    if isinstance(value, dict):
        return {name: hide_strings(child) for name, child in value.items()}
    if isinstance(value, list | tuple):
        return [hide_strings(child) for child in value]
    return HIDDEN if isinstance(value, str) else value


def keys_from_environment(cfg: DictConfig) -> list[str]:
    """Return the keys of a config whose values depend on an environment variable, directly or through other keys.

    Every interpolation is resolved while calls of `oc.env` are recorded.
    """
    asked: list[str] = []

    def record(name: str, *default: Any) -> Any:
        asked.append(name)
        return oc.env(name, *default)

    found: list[str] = []
    texts = [(key, text) for key, text in leaves(OmegaConf.to_container(cfg, resolve=False)) if isinstance(text, str)]
    if not any("oc.env" in text for _, text in texts):
        return found
    OmegaConf.register_new_resolver("oc.env", record, replace=True)
    try:
        for key, text in texts:
            if "${" in text:
                asked.clear()
                value = OmegaConf.select(cfg, key)
                if OmegaConf.is_config(value):
                    OmegaConf.to_container(value, resolve=True)
                found += [key] if asked else []
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    return found


def private_values(config: DictConfig, from_environment: Iterable[str]) -> list[str]:
    """Return the strings of a resolved config that came from the environment, from 3 letters on."""
    found = [OmegaConf.select(config, key) for key in from_environment]
    plain = OmegaConf.to_container(OmegaConf.create(found))
    return [text for _, text in leaves(plain) if isinstance(text, str) and len(text) > 2]


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value below nested dicts and lists with its key, such as `data.paths[0]`."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from leaves(child, join_keys(key, str(name)))
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from leaves(child, f"{key}[{i}]")
    else:
        yield key, node
