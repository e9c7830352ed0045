"""Write what latents respond to and promote in the files of SAEDashboard and Neuronpedia."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Int
from torch import Tensor

from sae_lab.activations.data import ActivationData
from sae_lab.evaluation.decoder_rows import describe_rows
from sae_lab.evaluation.latents import describe_latents
from sae_lab.interop import neuronpedia, sae_dashboard
from sae_lab.interop.sae_dashboard import Feature, Place, feature_of
from sae_lab.interop.sae_lens import hook_names
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

DASHBOARDS = ("neuronpedia", "saedashboard")


class Names(NamedTuple):
    """Names under which Neuronpedia lists the latents; None: derived from the language model, site and SAE."""

    model: str | None = None
    layer: int | None = None
    source_set: str | None = None
    release: str | None = None
    creator: str | None = None


def write_dashboards(
    sae: BaseSAE,
    data: ActivationData,
    latents: Int[Tensor, " c"],
    format: str,
    out: Path,
    provenance: Mapping[str, Any],
    names: Names = Names(),  # noqa: B008
    **sizes: int,
) -> Place:
    """Write the chosen latents as batches of SAEDashboard, or as the folder that Neuronpedia imports.

    Args:
        latents: their numbers, ascending.
        format: `saedashboard` or `neuronpedia`.
        provenance: that of the SAE, which names the data set.
        names: how Neuronpedia lists the latents.
        sizes: the other arguments of `describe_latents`.

    Returns:
        The names that were used.

    Raises:
        UserError: a name is missing or not allowed.
    """
    place = place_of(sae, data, provenance, names, sizes["n_tokens"])
    description = describe_latents(sae, data, latents, **sizes)
    features = features_of(description, describe_rows(sae, data.lm, latents), place)
    if format == "saedashboard":
        chosen = set(latents.tolist())
        sae_dashboard.write(features, place, [i for i in range(sae.n_latents) if i not in chosen], out)
        return place
    neighbours = {row["latent"]: row["neighbours"] for row in description["latents"]}
    neuronpedia.write(features, neighbours, place, release_of(sae, data, place, names), out)
    return place


def features_of(description: Mapping[str, Any], rows: list[dict[str, Any]], place: Place) -> Iterator[Feature]:
    """Yield the described latents in SAEDashboard's words."""
    for row, decoder_row in zip(description["latents"], rows, strict=True):
        yield feature_of(row | decoder_row, description["tokens"], place)


def place_of(sae: BaseSAE, data: ActivationData, provenance: Mapping[str, Any], names: Names, n_tokens: int) -> Place:
    """Return the names of the SAE on Neuronpedia, and the size of the text."""
    site = data.lm.sites[0]
    return Place(
        model=allowed("model", names.model or simplified(data.lm.name)),
        layer=layer_of(site) if names.layer is None else names.layer,
        source_set=allowed("source_set", names.source_set or f"sae-lab-{sae.n_latents}"),
        hook=hook_names(site)["hook_name"] or site,
        n_prompts=max(1, n_tokens // data.seq_len),
        n_tokens_in_prompt=data.seq_len,
        dataset=data_set_of(provenance),
    )


def release_of(sae: BaseSAE, data: ActivationData, place: Place, names: Names) -> neuronpedia.Release:
    """Return the release to which the SAE belongs."""
    sites = ", ".join(data.lm.sites)
    return neuronpedia.Release(
        name=allowed("release", names.release or f"{place.model}-{place.source_set}"),
        title=f"{type(sae).__name__} of {place.model} at {sites}, {sae.n_latents:,} latents",
        creator=names.creator or "SAE Lab",
    )


def layer_of(site: str) -> int:
    """Return the number of a site's layer, the first one in its name."""
    found = re.search(r"\d+", site)
    if found is None:
        raise UserError(f"the site {site} has no number of a layer in its name: give layer=NUMBER.")
    return int(found[0])


def simplified(name: str) -> str:
    """Return a model's name without its owner or folder, as Neuronpedia's ids are: gemma-2-2b."""
    return re.sub(r"[^a-z0-9._-]+", "-", Path(name).name.lower())


def allowed(key: str, name: str) -> str:
    """Return a name that becomes part of a URL and of a folder; raise a UserError if it cannot."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or "__" in name:
        raise UserError(
            f"{key}={name} must consist of letters, digits, dots, dashes and single underscores: it becomes part of "
            f"a URL. Give {key}=another-name."
        )
    return name


def data_set_of(provenance: Mapping[str, Any]) -> str:
    """Return the name of the text, as far as the provenance has one."""
    data = provenance.get("data") or {}
    paths = data.get("path") or data.get("paths") or data.get("_target_") or ""
    return paths if isinstance(paths, str) else ", ".join(map(str, paths))
