"""Find and download SAEs on the Hugging Face hub: by name of release, or by repository and folder."""

import difflib
from pathlib import Path
from typing import Any, NamedTuple

from sae_lab.interop.circuit_tracer import decoder_of
from sae_lab.interop.releases import Release, releases
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.hub import hub_errors
from sae_lab.runtime.near_paths import is_path, no_such_path


class Entry(NamedTuple):
    """Where an SAE is on the hub, and what its files do not say."""

    repo_id: str
    path: str
    format: str | None = None
    """The format of the release; None if only the repository is known."""
    facts: dict[str, Any] = {}
    """Arguments of that format's reader."""


def find_entry(source: str, sae_id: str | None) -> Entry:
    """Look up an SAE in the table of releases; if `source` is no release, take it as a repository on the hub.

    Raises:
        UserError: the release is unknown, or does not have this SAE; `source` is a path, and nothing is there.
    """
    table = releases()
    if source in table:
        return entry_of(source, table[source], sae_id)
    same = [release for release in table.values() if release.repo == source]
    if is_path(source) or ("/" in source and Path(source).parent.is_dir() and not same):
        raise UserError(no_such_path(source))
    if "/" not in source:
        close = difflib.get_close_matches(source, table, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`python -m sae_lab.releases` lists them."
        raise UserError(f"{source} is not a folder, a file or one of the {len(table)} releases known here: {hint}")
    for release in same:
        for name, path in release.paths().items():
            if sae_id in (name, path):
                return Entry(source, sae_id if sae_id == path else path, release.format, release.facts(name))
    return Entry(source, sae_id or "", same[0].format if same else None, same[0].facts(None) if same else {})


def entry_of(name: str, release: Release, sae_id: str | None) -> Entry:
    paths = release.paths()
    if sae_id not in paths:
        close = difflib.get_close_matches(str(sae_id), paths, n=5, cutoff=0.3) or list(paths)[:5]
        raise UserError(
            f"the release {name} has no SAE {sae_id!r}: give sae_id=<one of {len(paths)}>, such as {', '.join(close)}; "
            f"`python -m sae_lab.releases {name}` lists them."
        )
    return Entry(release.repo, paths[sae_id], release.format, release.facts(sae_id))


def download(entry: Entry) -> Path:
    """Download one SAE to the hub's cache and return its folder or file.

    Raises:
        UserError: the hub cannot be reached, or does not have the repository.
    """
    from huggingface_hub import snapshot_download

    unreachable = f"{entry.repo_id} cannot be downloaded from the hub ({{reason}}): give a local folder instead."
    patterns = [entry.path, f"{entry.path}/*", *decoder_of(entry.path)] if entry.path else None
    with hub_errors(unreachable):
        root = snapshot_download(entry.repo_id, allow_patterns=patterns)
    return Path(root) / entry.path
