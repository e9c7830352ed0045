"""Lists of published SAEs for people: releases that match words, and the SAEs of one release."""

from collections.abc import Sequence

from sae_lab.interop.releases import UNREADABLE, Release, releases
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.plain_text import plural

FIRST = 30
"""How many SAEs of a release are listed unless all are asked for."""


def find(words: Sequence[str]) -> dict[str, Release]:
    """Return the releases whose name, repository, model or format has all the words; one that is named, alone.

    Raises:
        UserError: there is none.
    """
    table = releases()
    if len(words) == 1 and words[0] in table:
        return {words[0]: table[words[0]]}
    lower = [word.lower() for word in words]
    found = {
        name: release
        for name, release in table.items()
        if all(word in f"{name} {release.repo} {release.model} {release.format}".lower() for word in lower)
    }
    if not found:
        raise UserError(
            f"search={' '.join(words)} matches none of {len(table)} releases: try gemma, llama, qwen or gpt2."
        )
    return found


def lines(found: dict[str, Release], every: bool) -> list[str]:
    """Return the list: of several releases, one block each; of a single release, its SAEs as well."""
    if len(found) == 1:
        return [*describe(*next(iter(found.items()))), *list_saes(*next(iter(found.items())), every)]
    count = sum(len(release.paths()) for release in found.values())
    blocks = [line for name, release in found.items() for line in describe(name, release)]
    return [
        *blocks,
        f"{len(found)} releases, {count:,} SAEs. Add words, or give one name, to see the ids of a release.",
    ]


def describe(name: str, release: Release) -> list[str]:
    """Return what the table says about a release, with the line that loads one of its SAEs."""
    paths = release.paths()
    first = next(iter(paths))
    latents = sorted({n for sae_id in paths if (n := release.latents_of(sae_id))})
    sizes = [f"d={release.d}"] if release.d else []
    sizes += [f"latents={latents[0]:,}" + (f" to {latents[-1]:,}" if len(latents) > 1 else "")] if latents else []
    return [
        f"{name}  ({plural(len(paths), 'SAE')} of {release.model}: {', '.join(sizes)}; {release.format})",
        f"    site: {release.site_of(first) if len(paths) == 1 else release.site.replace('{}', '<layer>')}",
        loading_line(name, release, first),
    ]


def loading_line(name: str, release: Release, sae_id: str) -> str:
    if release.format in UNREADABLE:
        return f"    cannot be loaded: it is {UNREADABLE[release.format]}"
    return f'    load_sae("{name}", sae_id="{sae_id}")'


def list_saes(name: str, release: Release, every: bool) -> list[str]:
    """Return one line for each SAE of a release: id, site, number of latents."""
    ids = list(release.paths())
    shown = ids if every else ids[:FIRST]
    width = max(map(len, shown))
    rows = [
        f"    {sae_id:<{width}}  {release.site_of(sae_id)}  {show_count(release, sae_id)}".rstrip() for sae_id in shown
    ]
    return rows if len(shown) == len(ids) else [*rows, f"    ... {len(ids) - len(shown)} more: add every=true."]


def show_count(release: Release, sae_id: str) -> str:
    n = release.latents_of(sae_id)
    return f"{n:,} latents" if n else ""
