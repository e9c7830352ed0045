"""Write what SAEDashboard's Neuronpedia runner writes about latents: batch-<i>.json, and which latents are left out.

References:
    https://github.com/jbloomAus/SAEDashboard, sae_dashboard/neuronpedia/neuronpedia_dashboard.py, version 0.8.0
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

from sae_lab.runtime.files import write_atomically, write_json

BATCH = 128
"""Latents in one file, as the runner has them by default."""
TOP = (-1.0, -1.0)
"""bin_min and bin_contains of the strongest activations, which are no interval."""


class Context(TypedDict):
    """Tokens of a text with a latent's activation on each."""

    bin_min: float
    bin_max: float
    bin_contains: float
    """The interval of activations from which the context was drawn, and the share of tokens whose activation is in it.
    """
    tokens: list[str]
    values: list[float]
    qualifying_token_index: int
    """The token for which the context was chosen."""


class Feature(TypedDict):
    """What is shown of one latent. A list is empty where something was not measured."""

    feature_index: int
    neuron_alignment_indices: list[int]
    neuron_alignment_values: list[float]
    neuron_alignment_l1: list[float]
    correlated_neurons_indices: list[int]
    correlated_neurons_l1: list[float]
    correlated_neurons_pearson: list[float]
    correlated_features_indices: list[int]
    correlated_features_l1: list[float]
    correlated_features_pearson: list[float]
    neg_str: list[str]
    neg_values: list[float]
    pos_str: list[str]
    pos_values: list[float]
    frac_nonzero: float
    freq_hist_data_bar_values: list[float]
    freq_hist_data_bar_heights: list[int]
    logits_hist_data_bar_heights: list[int]
    logits_hist_data_bar_values: list[float]
    n_prompts_total: int
    n_tokens_in_prompt: int
    dataset: str
    decoder_weights_dist: list[float]
    activations: list[Context]
    vector: list[float]


@dataclass(frozen=True)
class Place:
    """Where the latents belong: the names under which SAEDashboard and Neuronpedia list them."""

    model: str
    layer: int
    source_set: str
    hook: str
    """The site, by its TransformerLens name where it has one."""
    n_prompts: int
    n_tokens_in_prompt: int
    dataset: str

    @property
    def source(self) -> str:
        """Neuronpedia's id of the SAE: 5-res-16k."""
        return f"{self.layer}-{self.source_set}"


def feature_of(row: Mapping[str, Any], spelled: Mapping[int, str], place: Place) -> Feature:
    """Return a latent in SAEDashboard's words.

    Args:
        row: a description of `describe_latents`, with the fields `logit_histogram` and `largest_dimensions`.
        spelled: the tokens' spellings by id.
    """
    histogram, logits, dimensions = row["histogram"], row["logit_histogram"], row["largest_dimensions"]
    width = (histogram["top"] - histogram["bottom"]) / len(histogram["counts"])
    bars = list(enumerate(histogram["counts"])) if row["density"] else []
    promoted, suppressed = row.get("promoted", []), row.get("suppressed", [])
    return {
        "feature_index": row["latent"],
        "neuron_alignment_indices": dimensions["indices"],
        "neuron_alignment_values": dimensions["values"],
        "neuron_alignment_l1": dimensions["shares"],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": [spelled[entry["token"]] for entry in suppressed],
        "neg_values": [entry["logit"] for entry in suppressed],
        "pos_str": [spelled[entry["token"]] for entry in promoted],
        "pos_values": [entry["logit"] for entry in promoted],
        "frac_nonzero": row["density"],
        "freq_hist_data_bar_values": [round(histogram["bottom"] + (i + 0.5) * width, 5) for i, _ in bars],
        "freq_hist_data_bar_heights": [count for _, count in bars],
        "logits_hist_data_bar_heights": logits["counts"],
        "logits_hist_data_bar_values": logits["middles"],
        "n_prompts_total": place.n_prompts,
        "n_tokens_in_prompt": place.n_tokens_in_prompt,
        "dataset": place.dataset,
        "decoder_weights_dist": [],
        "activations": list(contexts_of(row, spelled)),
        "vector": [],
    }


def contexts_of(row: Mapping[str, Any], spelled: Mapping[int, str]) -> Iterator[Context]:
    """Yield the contexts of a latent: the strongest activations, then intervals of the others, the highest first."""
    deciles = row.get("deciles", [])
    intervals = [(part["from"], part["to"], row["density"] / len(deciles), part["contexts"]) for part in deciles]
    groups = [
        (TOP[0], row["max"], TOP[1], row["top"]),
        *intervals,
        (row["min"], row["max"], row["density"], row["random"]),
        (row["min"], 0.0, row["density"], row["bottom"]),
    ]
    for low, high, share, contexts in groups:
        for context in contexts:
            yield {
                "bin_min": low,
                "bin_max": high,
                "bin_contains": share,
                "tokens": [spelled[token] for token in context["tokens"]],
                "values": context["activations"],
                "qualifying_token_index": context["centre"],
            }


def in_batches(features: Iterator[Feature]) -> Iterator[list[Feature]]:
    """Yield the latents in lists of `BATCH`."""
    while batch := list(islice(features, BATCH)):
        yield batch


def remove_batches(folder: Path) -> None:
    """Delete the batches of an earlier export, which may have had more of them."""
    for file in folder.glob("batch-*.json*"):
        file.unlink()


def write(features: Iterator[Feature], place: Place, left_out: Sequence[int], folder: Path) -> None:
    """Write the latents in batches.

    Args:
        left_out: the latents that are not among `features`.
    """
    remove_batches(folder)
    head = {"model_id": place.model, "layer": place.layer, "sae_set": place.source_set}
    for i, batch in enumerate(in_batches(features)):
        content = json.dumps(head | {"sae_id_suffix": None, "features": batch}, allow_nan=False)
        write_atomically(folder / f"batch-{i}.json", content.encode())
    skipped = {**head, "layer": str(place.layer), "log_sparsity": None, "skipped_indexes": list(left_out)}
    write_json(folder / "skipped_indexes.json", skipped)
    write_json(folder / "run_settings.json", run_settings(place))


def run_settings(place: Place) -> dict[str, Any]:
    """Return the settings of SAEDashboard's runner that say what the batches show."""
    return {
        "sae_set": place.source_set,
        "model_id": place.model,
        "layer": place.layer,
        "hook_point": place.hook,
        "huggingface_dataset_path": place.dataset,
        "n_prompts_total": place.n_prompts,
        "n_tokens_in_prompt": place.n_tokens_in_prompt,
        "n_features_at_a_time": BATCH,
    }
