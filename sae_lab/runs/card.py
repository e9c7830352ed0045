"""Model card of an exported SAE."""

import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from sae_lab.runs.config import config_file, read_config, read_environment_keys
from sae_lab.runs.digests import METRICS
from sae_lab.runs.results import read_metrics
from sae_lab.runtime.private import public
from sae_lab.runtime.screen import format_number
from sae_lab.saes.base import BaseSAE

MACHINE_KEYS = ("run_dir", "logger")
"""Keys of a config to leave out of the card: they say where files went, and nothing about the SAE."""


def write_card(sae: BaseSAE, provenance: dict[str, Any], run_dir: Path, format: str, sae_id: str | None = None) -> str:
    """Return the model card as Markdown: the SAE, what it was trained on, its metrics, figures and config.

    Args:
        format: name of the file format in which the SAE was exported.
        sae_id: the file of the SAE, if the folder may contain several.
    """
    provenance = public(provenance)
    header = {"tags": ["sparse-autoencoder", "interpretability", format], "library_name": "sae_lab"}
    model, sites = provenance.get("model", {}).get("name"), ", ".join(provenance.get("sites", []))
    lines = [
        "---",
        yaml.safe_dump(header).strip(),
        "---",
        "",
        f"# {type(sae).__name__} of {f'{model} at ' if model else ''}{sites}",
        "",
    ]
    lines += describe_roles(sae, provenance.get("sites", []))
    if sae.signed:
        lines += ["Codes have signs: a latent is active where its value is not zero.", ""]
    lines += [f"{sae.n_latents:,} latents, activations of width {sae.d_in}, in the files of {format}. Load it with", ""]
    lines += [
        "```python",
        "from sae_lab import load_sae",
        "",
        f'sae = load_sae("<this folder or repository>"{f", sae_id={json.dumps(sae_id)}" if sae_id else ""})',
        "```",
        "",
    ]
    for name in ("model", "data", "bos", "versions", "commit"):
        lines += [f"{name}: `{provenance.get(name)}`", ""]
    lines += [*metrics_table(run_dir), ""]
    lines += [f"![{file.stem}](figures/{file.name})" for file in sorted((run_dir / "figures").glob("*.png"))]
    if config_file(run_dir).is_file():
        config = public(OmegaConf.to_container(read_config(run_dir)), read_environment_keys(run_dir))
        shown = {name: value for name, value in config.items() if name not in MACHINE_KEYS}
        lines += ["", "## Config", "", "```yaml", OmegaConf.to_yaml(OmegaConf.create(shown)).strip(), "```"]
    return "\n".join([*lines, ""])


def describe_roles(sae: BaseSAE, sites: list[str]) -> list[str]:
    """Return lines that say which sites a transcoder reads and predicts. Empty for an SAE, or if sites are unknown."""
    if not (sae.n_inputs and sites):
        return []
    names = [f"`{site}`" for site in sites]
    read, predicted = ", ".join(names[: sae.n_inputs]), ", ".join(names[sae.n_inputs :])
    return [f"A transcoder: from activations at {read} it predicts those at {predicted}, `sae.predict(x)`.", ""]


def metrics_table(run_dir: Path) -> list[str]:
    """Return metrics.json as a Markdown table (names as in sae_lab/evaluation/metrics.py); empty if it is missing."""
    if not (run_dir / METRICS).is_file():
        return []
    metrics = read_metrics(run_dir).items()
    rows = [f"| {name} | {format_number(value)} |" for name, value in metrics if isinstance(value, int | float)]
    return ["## Metrics on held-out text", "", "| metric | value |", "|---|---|", *rows]
