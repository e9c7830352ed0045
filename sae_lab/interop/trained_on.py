"""What an SAE's files or the table of releases say of the language model and the sites that it was trained on."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sae_lab.interop import download
from sae_lab.interop.releases import Release, releases
from sae_lab.interop.sae_lens import RESIDUAL
from sae_lab.interop.tensors import read_json

CONFIGS = ("cfg.json", "config.json", "hyperparams.json")
READ = ("hook_name", "hf_hook_name", "hook_point", "hook_point_in", "hf_hook_point_in", "submodule_name")
PREDICTED = ("hook_name_out", "hf_hook_name_out", "hook_point_out", "hf_hook_point_out")
"""Keys under which the libraries name the site that is read, and the one that a transcoder predicts."""
SUBMODULE = re.compile(r"(resid_post|mlp_out|attn_out)_layer_(\d+)")
"""Names of dictionary_learning's published SAEs, for submodule_name."""


class TrainedOn(NamedTuple):
    """Where an SAE was trained.

    Attributes:
        model: what the files call the language model; None: unknown.
        sites: the sites, in lists that name the same ones in different ways; empty: unknown.
    """

    model: str | None
    sites: list[list[str]]


def trained_on(source: str | Path, sae_id: str | None, n_inputs: int, n_sources: int) -> TrainedOn:
    """Return what is known of where the SAE `load_sae(source, sae_id=sae_id)` was trained.

    Args:
        n_inputs, n_sources: those of the SAE. Names of another number of sites are ignored.
    """
    model, names = said_of(source, sae_id)
    if n_sources == 1 and not n_inputs:
        names = names[:1]  # some formats say where an SAE's x_hat goes, too: the same place
    if len(names) != n_sources:
        return TrainedOn(model, [])
    ways = [[*dict.fromkeys(way for name in same for way in spellings(name))] for same in names]
    return TrainedOn(model, [[way[min(i, len(way) - 1)] for way in ways] for i in range(max(map(len, ways)))])


def said_of(source: str | Path, sae_id: str | None) -> tuple[str | None, list[list[str]]]:
    """Return the model and, for each site, its names."""
    path = Path(source).expanduser()
    if not path.exists():
        if found := release_of(str(source), sae_id):
            release, name = found
            sites = release.site_of(name)
            return release.model, [] if "?" in sites else [[site] for site in sites.split(" > ")]
        path, sae_id = download.download(download.find_entry(str(source), sae_id)), None
    for file in (path / (sae_id or "") / name for name in CONFIGS):
        if file.is_file():
            return said_in(read_json(file))
    return None, []


def release_of(source: str, sae_id: str | None) -> tuple[Release, str] | None:
    """Return the release that an SAE on the hub is of, and its id there."""
    for name, release in releases().items():
        if source in (name, release.repo):
            for known, path in release.paths().items():
                if sae_id in (known, path):
                    return release, known
    return None


def said_in(config: Mapping[str, Any]) -> tuple[str | None, list[list[str]]]:
    """Return the model and, for each site, its names, as the config of an SAE of any library has them."""
    parts = [config.get(name) for name in ("provenance", "metadata", "trainer")]
    said: dict[str, Any] = {**config}
    for part in parts:
        said |= part if isinstance(part, dict) else {}
    if isinstance(said.get("sites"), list):  # ours
        model = said.get("model")
        return model.get("name") if isinstance(model, dict) else None, [[str(site)] for site in said["sites"]]
    layer = said.get("hook_point_layer", said.get("hook_layer"))
    sites = [
        [str(said[key]).replace("{layer}", str(layer)) for key in keys if said.get(key)] for keys in (READ, PREDICTED)
    ]
    return said.get("model_name") or said.get("lm_name"), [names for names in sites if names]


def spellings(name: str) -> list[str]:
    """Return the ways to write a site: TransformerLens' name first, where it is known."""
    name = re.sub(r" \(input\)$", ".input", name)
    if named := SUBMODULE.fullmatch(name):
        return [f"blocks.{named[2]}.hook_{named[1]}"]
    block = RESIDUAL.fullmatch(name.removesuffix(".output"))
    return [*([f"blocks.{block[1]}.hook_resid_post"] if block else []), name]
