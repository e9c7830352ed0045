"""Write the folder that Neuronpedia imports: rows of its tables, as lines of JSON.

    <model>/<layer>-<source set>/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
                                 features/batch-<i>.jsonl.gz, activations/batch-<i>.jsonl.gz

References:
    https://github.com/hijohnnylin/neuronpedia: apps/webapp/app/api/admin/import/route.ts reads the files,
    apps/webapp/lib/db/import.ts inserts them, apps/webapp/prisma/schema.prisma has the tables
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lab.interop.sae_dashboard import Context, Feature, Place, in_batches, remove_batches
from sae_lab.runtime.files import digest_of_json, write_atomically

Row = Mapping[str, Any]
CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The user to whom imports belong: the one whom every new database of Neuronpedia has."""


@dataclass(frozen=True)
class Release:
    """Who publishes the latents, and under which name."""

    name: str
    title: str
    creator: str
    creator_id: str = CREATOR_ID


def write(
    features: Iterator[Feature], neighbours: Mapping[int, Iterable[Row]], place: Place, release: Release, folder: Path
) -> Path:
    """Write the folder <model>/<source> below `folder`. Return it.

    Columns with a default in the database are left out, such as createdAt: so the same latents give the same bytes.

    Args:
        neighbours: for each latent those with the most similar decoder rows, as `describe_latents` names them.
    """
    source = folder / place.model / place.source
    for part in ("features", "activations"):
        remove_batches(source / part)
    for name, row in head_rows(place, release).items():
        write_atomically(source / f"{name}.jsonl", lines([row]))
    for i, batch in enumerate(in_batches(features)):
        rows = {
            "features": [neuron_row(feature, neighbours, place, release) for feature in batch],
            "activations": [row for feature in batch for row in activation_rows(feature, place, release)],
        }
        for part, content in rows.items():
            write_atomically(source / part / f"batch-{i}.jsonl.gz", gzip.compress(lines(content), mtime=0))
    return source


def lines(rows: Iterable[Row]) -> bytes:
    """Return rows as lines of JSON."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows).encode()


def head_rows(place: Place, release: Release) -> dict[str, Row]:
    """Return the rows of the release, the model, the source set and the source. Existing ones stay as they are."""
    owner = {"creatorId": release.creator_id, "visibility": "PUBLIC"}
    return {
        "release": {
            **owner,
            "name": release.name,
            "description": release.title,
            "descriptionShort": release.title,
            "urls": [],
            "creatorName": release.creator,
            "creatorNameShort": release.creator,
        },
        "model": {
            **owner,
            "id": place.model,
            "displayName": place.model,
            "displayNameShort": place.model,
            "layers": 0,  # 0: what Neuronpedia's own converter writes, since only pages of MLP neurons use them
            "neuronsPerLayer": 0,
            "owner": "",
        },
        "sourceset": {
            **owner,
            "modelId": place.model,
            "name": place.source_set,
            "description": release.title,
            "creatorName": release.creator,
            "urls": [],
            "releaseName": release.name,
        },
        "source": {
            **owner,
            "id": place.source,
            "modelId": place.model,
            "setName": place.source_set,
            "dataset": place.dataset,
            "num_prompts": place.n_prompts,
            "num_tokens_in_prompt": place.n_tokens_in_prompt,
        },
    }


SAME = [
    *(f"neuron_alignment_{name}" for name in ("indices", "values", "l1")),
    *(f"correlated_{part}_{name}" for part in ("neurons", "features") for name in ("indices", "pearson", "l1")),
    *(f"{sign}_{name}" for sign in ("neg", "pos") for name in ("str", "values")),
    "frac_nonzero",
    *(f"{part}_hist_data_bar_{name}" for part in ("freq", "logits") for name in ("heights", "values")),
    "decoder_weights_dist",
]
"""Columns of the table Neuron that SAEDashboard's batches have by the same name."""


def neuron_row(
    feature: Feature, neighbours: Mapping[int, Iterable[Row]], place: Place, release: Release
) -> dict[str, Any]:
    """Return a latent's row of the table Neuron."""
    near = list(neighbours[feature["feature_index"]])
    strongest = (max(context["values"]) for context in feature["activations"])
    return {
        **address(feature, place, release),
        "sourceSetName": place.source_set,
        "maxActApprox": max([0.0, *strongest]),
        "topkCosSimIndices": [entry["latent"] for entry in near],
        "topkCosSimValues": [entry["cosine"] for entry in near],
        **{name: value for name, value in feature.items() if name in SAME},
    }


def activation_rows(feature: Feature, place: Place, release: Release) -> Iterator[dict[str, Any]]:
    """Yield a latent's rows of the table Activation."""
    for i, context in enumerate(feature["activations"]):
        values, where = context["values"], address(feature, place, release)
        yield {
            "id": identifier(where, i, context),
            **where,
            "tokens": context["tokens"],
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "binMin": context["bin_min"],
            "binMax": context["bin_max"],
            "binContains": context["bin_contains"],
            "qualifyingTokenIndex": context["qualifying_token_index"],
        }


def address(feature: Feature, place: Place, release: Release) -> dict[str, str]:
    """Return the columns that say which latent a row is about, and whose it is."""
    index = str(feature["feature_index"])
    return {"modelId": place.model, "layer": place.source, "index": index, "creatorId": release.creator_id}


def identifier(where: Mapping[str, str], i: int, context: Context) -> str:
    """Return an id of the form of a cuid: 25 letters and digits. The same context gets the same one again."""
    return "c" + digest_of_json([where, i, context])[:24]
