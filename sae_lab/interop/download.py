"""SAEs on the Hugging Face hub: by SAELens release, or by repository and folder.

Of sae-lens one file is read, its table of releases; `pip install --no-deps sae-lens` brings it. With its dependencies
it cannot be installed beside this package: it wants transformer-lens < 4.
"""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.hub import hub_errors

CONVERSIONS = (None, "gemma_2", "sparsify", "dictionary_learning_1")
"""The conversions of SAELens' release table whose files a reader of this package knows; None is its own format."""


class Entry(NamedTuple):
    """One SAE of the release table."""

    repo_id: str
    path: str
    overrides: dict[str, Any]
    scale: float | None


def find(source: str, sae_id: str | None) -> Entry:
    """Where an SAE lies: by the release table of an installed sae-lens (read as data), else repository and folder.

    Raises:
        UserError: an unknown release, an SAE that it does not have, or one of a format that nobody reads here.
    """
    table = release_table()
    if source not in table:
        if "/" not in source:
            known = f"sae-lens knows {len(table)} others"
            known = known if table else "`pip install --no-deps sae-lens` for its table of them"
            raise UserError(f"{source} is no folder, file or release ({known}): give a path or user/repository.")
        return Entry(source, sae_id or "", {}, None)
    release = table[source]
    entries = {entry["id"]: entry for entry in release["saes"]}
    if sae_id not in entries:
        raise UserError(f"the release {source} has no SAE {sae_id!r}: give sae_id=<one of {', '.join(entries)}>.")
    if release.get("conversion_func") not in CONVERSIONS:
        raise UserError(
            f"the release {source} has files that sae-lens converts by {release['conversion_func']}: "
            "load them in an environment of its own and save them to a folder."
        )
    entry = entries[sae_id]
    overrides = release.get("config_overrides") or {}
    return Entry(release["repo_id"], str(entry["path"]), overrides, entry.get("norm_scaling_factor"))


def release_table() -> dict[str, Any]:
    """SAELens' pretrained_saes.yaml where sae-lens is installed, else nothing. Nothing of it is imported."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        return {}
    file = Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml"
    return yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def download(entry: Entry) -> Path:
    """The folder, or file, of one SAE in the hub's cache.

    Raises:
        UserError: the hub cannot be reached, or does not have it.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(f"{entry.repo_id} cannot be fetched from the hub ({{reason}}): download it, and give its folder."):
        root = snapshot_download(entry.repo_id, allow_patterns=[entry.path, f"{entry.path}/*"] if entry.path else None)
    return Path(root) / entry.path
