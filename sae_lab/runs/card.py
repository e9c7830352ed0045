"""Model card of an exported SAE."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from sae_lab.interop.sae_dashboard import Place
from sae_lab.runs.config import config_file, read_config, read_environment_keys
from sae_lab.runs.digests import METRICS
from sae_lab.runs.results import read_metrics
from sae_lab.runtime.plain_text import for_markdown
from sae_lab.runtime.private import public
from sae_lab.runtime.screen import format_number
from sae_lab.saes.base import BaseSAE

MACHINE_KEYS = ("run_dir", "logger")
"""Keys of a config to leave out of the card: they say where files went, and nothing about the SAE."""

LOADED_BY = {
    "sae_lens": (
        "SAELens",
        """from sae_lens import SAE

sae = SAE.load_from_disk("<this folder>")  # from the hub: SAE.from_pretrained("<repository>", ".")""",
    ),
    "sparsify": (
        "sparsify",
        """from sparsify import SparseCoder

sae = SparseCoder.load_from_disk("<this folder>")  # from the hub: SparseCoder.load_from_hub("<repository>")""",
    ),
    "dictionary_learning": (
        "dictionary_learning",
        """from dictionary_learning.utils import load_dictionary

sae, config = load_dictionary("<this folder>", device="cpu")""",
    ),
    "circuit_tracer": (
        "circuit-tracer",
        """from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

transcoders, config = load_transcoder_from_hub("<repository>")""",
    ),
}
"""For each format, the library of that name and how it loads the files."""

FACTS = ("k", "normalize", "penalty", "signed", "skip", "group_sizes", "tied")
"""Settings of an SAE that its card names, where they are set."""


def write_card(sae: BaseSAE, provenance: dict[str, Any], run_dir: Path, format: str, sae_id: str | None = None) -> str:
    """Return the model card as Markdown: the SAE, how it is loaded, its training, metrics, figures and config.

    Args:
        format: name of the file format in which the SAE was exported.
        sae_id: the file of the SAE, if the folder may contain several.
    """
    provenance = public(provenance)
    lines = [
        *heading(sae, provenance, format),
        *describe_roles(sae, provenance.get("sites", [])),
        *(["Codes have signs: a latent is active where its value is not zero.", ""] if sae.signed else []),
        *how_to_load(format, sae_id),
        *table("The SAE", ("setting", "value"), sae_facts(sae)),
        *table("Training", ("fact", "value"), training_facts(provenance)),
        *table("Metrics on held-out text", ("metric", "value"), metric_rows(run_dir)),
        *(f"![{file.stem}](figures/{file.name})\n" for file in sorted((run_dir / "figures").glob("*.png"))),
        *config_of(run_dir),
    ]
    return "\n".join(lines)


def write_dashboards_card(sae: BaseSAE, provenance: dict[str, Any], run_dir: Path, format: str, place: Place) -> str:
    """Return the card of a folder with what is shown of the latents: what it holds, and how it is imported."""
    provenance = public(provenance)
    if format == "neuronpedia":
        how = [
            f"`{place.model}/{place.source}/` holds the rows that Neuronpedia imports. For <https://www.neuronpedia.org>,",
            "send its makers the folder. An instance of your own reads it from `v1/` of its S3 bucket, by",
            f"`/api/admin/import?modelId={place.model}&sourceId={place.source}`.",
        ]
    else:
        how = [
            "`batch-*.json` are the batches of SAEDashboard's Neuronpedia runner, `skipped_indexes.json` names the",
            "latents that are not among them. SAEDashboard's `export_neuronpedia_dashboards` makes Neuronpedia's files",
            "of them; `format=neuronpedia` writes these at once.",
        ]
    lines = [
        *heading(sae, provenance, format),
        *how,
        "",
        *table("The SAE", ("setting", "value"), sae_facts(sae)),
        *table("The text", ("fact", "value"), text_facts(place)),
        *table("Training", ("fact", "value"), training_facts(provenance)),
        *table("Metrics on held-out text", ("metric", "value"), metric_rows(run_dir)),
    ]
    return "\n".join(lines)


def heading(sae: BaseSAE, provenance: Mapping[str, Any], format: str) -> list[str]:
    """Return the YAML header that the hub reads, and the title."""
    header = {"tags": ["sparse-autoencoder", "interpretability", format], "library_name": "sae_lab"}
    model, sites = provenance.get("model", {}).get("name"), ", ".join(provenance.get("sites", []))
    title = f"# {type(sae).__name__} of {f'{model} at ' if model else ''}{sites}"
    return ["---", yaml.safe_dump(header).strip(), "---", "", title, ""]


def describe_roles(sae: BaseSAE, sites: list[str]) -> list[str]:
    """Return lines that say which sites a transcoder reads and predicts. Empty for an SAE, or if sites are unknown."""
    if not (sae.n_inputs and sites):
        return []
    names = [f"`{site}`" for site in sites]
    read, predicted = ", ".join(names[: sae.n_inputs]), ", ".join(names[sae.n_inputs :])
    return [f"A transcoder: from activations at {read} it predicts those at {predicted}, `sae.predict(x)`.", ""]


def how_to_load(format: str, sae_id: str | None) -> list[str]:
    """Return the lines of code that load the SAE: in the library whose files these are, and here."""
    chosen = f", sae_id={json.dumps(sae_id)}" if sae_id else ""
    ours = f'from sae_lab import load_sae\n\nsae = load_sae("<this folder or repository>"{chosen})'
    libraries = [*([LOADED_BY[format]] if format in LOADED_BY else []), ("SAE Lab", ours)]
    return [line for name, code in libraries for line in (f"With {name}:", "", "```python", code, "```", "")]


def sae_facts(sae: BaseSAE) -> list[tuple[str, Any]]:
    """Return what is to know of the SAE itself."""
    config = {name: sae.config[name] for name in FACTS if sae.config.get(name) not in (None, False)}
    threshold = getattr(sae, "threshold", None)
    return [
        ("class", type(sae).__name__),
        ("latents", sae.n_latents),
        ("width of an activation", sae.d_in),
        *([("sites", sae.n_sources)] if sae.n_sources > 1 else []),
        *config.items(),
        *([("threshold", threshold.item())] if threshold is not None and threshold.numel() == 1 else []),
    ]


def text_facts(place: Place) -> list[tuple[str, Any]]:
    """Return what is to know of the text on which the latents were looked at."""
    rows = {"data set": place.dataset, "rows": place.n_prompts, "tokens in a row": place.n_tokens_in_prompt}
    return [*rows.items(), ("site", place.hook)]


def training_facts(provenance: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return what the SAE was trained on and by."""
    parts = ("model", "data", "bos", "optimizer")
    named = {part: dict(provenance.get(part) or {}) for part in parts}
    rate, kind = named["optimizer"].get("lr"), named["optimizer"].get("_target_")
    optimizer = f"{kind.rpartition('.')[2]}, learning rate {rate}" if kind else None
    said = {
        "model": named["model"].get("name"),
        "revision": named["model"].get("revision"),
        "processing of the model": named["model"].get("processing"),
        "sites": ", ".join(provenance.get("sites", [])),
        "text": named["data"].get("path") or named["data"].get("paths") or named["data"].get("_target_"),
        "tokens in a row": named["data"].get("seq_len"),
        "BOS": named["bos"].get("policy"),
        "left out": ", ".join(exclusions(named["data"])) or None,
        "tokens": provenance.get("n_tokens"),
        "batch size": provenance.get("batch_size"),
        "optimizer": optimizer,
        "seed": provenance.get("seed"),
        "versions": ", ".join(f"{name} {version}" for name, version in (provenance.get("versions") or {}).items()),
        "commit": provenance.get("commit"),
    }
    return [(name, value) for name, value in said.items() if value not in (None, "")]


def exclusions(data: Mapping[str, Any]) -> list[str]:
    """Return which tokens were left out, as settings."""
    names = ("exclude_bos", "exclude_first", "exclude_tokens", "max_norm")
    return [f"{name}={data[name]}" for name in names if data.get(name)]


def metric_rows(run_dir: Path) -> list[tuple[str, Any]]:
    """Return the numbers of metrics.json (names as in sae_lab/evaluation/metrics.py); empty if it is missing."""
    if not (run_dir / METRICS).is_file():
        return []
    return [(name, value) for name, value in read_metrics(run_dir).items() if isinstance(value, int | float)]


def table(title: str, columns: tuple[str, str], rows: Iterable[tuple[str, Any]]) -> list[str]:
    """Return a section with a table of two columns; nothing if it would be empty."""
    cells = [f"| {name} | {cell(value)} |" for name, value in rows]
    return [f"## {title}", "", f"| {columns[0]} | {columns[1]} |", "|---|---|", *cells, ""] if cells else []


def cell(value: Any) -> str:
    """Return a value as the cell of a table."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return format_number(value) if is_number else for_markdown(str(value))


def config_of(run_dir: Path) -> list[str]:
    """Return the run's config as a section; nothing if there is none."""
    if not config_file(run_dir).is_file():
        return []
    config = public(OmegaConf.to_container(read_config(run_dir)), read_environment_keys(run_dir))
    shown = {name: value for name, value in config.items() if name not in MACHINE_KEYS}
    return ["## Config", "", "```yaml", OmegaConf.to_yaml(OmegaConf.create(shown)).strip(), "```", ""]
