"""Find and download SAEs on the Hugging Face hub: by SAELens release, or by repository and folder.

The releases are listed in a table that is part of sae-lens: `pip install --no-deps sae-lens`. Nothing of sae-lens is
imported. Its dependencies cannot be installed together with this package: it needs transformer-lens < 4.
"""

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.hub import hub_errors

CONVERSIONS = (None, "gemma_2", "sparsify", "dictionary_learning_1")
"""Values of `conversion_func` in the release table whose files this package can read; None is SAELens' own format."""


class Entry(NamedTuple):
    """One SAE of the release table."""

    repo_id: str
    path: str
    overrides: dict[str, Any]
    scale: float | None


def find_entry(source: str, sae_id: str | None) -> Entry:
    """Look up an SAE in the release table; if `source` is not a release there, take it as a repository on the hub.

    Raises:
        UserError: the release is unknown, does not have this SAE, or has files of a format that cannot be read here.
    """
    table = release_table()
    if source not in table:
        if "/" not in source:
            known = f"sae-lens lists {len(table)} releases"
            known = known if table else "to load SAELens releases, `pip install --no-deps sae-lens`"
            raise UserError(f"{source} is not a folder, file or release ({known}): give a path or user/repository.")
        return Entry(source, sae_id or "", {}, None)
    release = table[source]
    entries = {entry["id"]: entry for entry in release["saes"]}
    if sae_id not in entries:
        raise UserError(f"the release {source} has no SAE {sae_id!r}: give sae_id=<one of {', '.join(entries)}>.")
    if release.get("conversion_func") not in CONVERSIONS:
        raise UserError(
            f"the release {source} has files that sae-lens converts with {release['conversion_func']}, which is not "
            "supported here: load the SAE with sae-lens in a separate environment, save it, and load that folder."
        )
    entry = entries[sae_id]
    overrides = release.get("config_overrides") or {}
    return Entry(release["repo_id"], str(entry["path"]), overrides, entry.get("norm_scaling_factor"))


def release_table() -> dict[str, Any]:
    """Read pretrained_saes.yaml of an installed sae-lens, without importing it; empty if it is not installed."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        return {}
    file = Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml"
    return yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def download(entry: Entry) -> Path:
    """Download one SAE to the hub's cache and return its folder or file.

    Raises:
        UserError: the hub cannot be reached, or does not have the repository.
    """
    from huggingface_hub import snapshot_download

    unreachable = f"{entry.repo_id} cannot be downloaded from the hub ({{reason}}): give a local folder instead."
    with hub_errors(unreachable):
        root = snapshot_download(entry.repo_id, allow_patterns=[entry.path, f"{entry.path}/*"] if entry.path else None)
    return Path(root) / entry.path
