"""The model card of a run's SAE."""

import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from sae_lab.runs.config import config_file, read_config
from sae_lab.runtime.screen import format_number
from sae_lab.saes.base import BaseSAE

MACHINES_OWN = ("run_dir", "logger")
"""Parts of a config that say nothing about the SAE, only where its files went."""


def write_card(sae: BaseSAE, provenance: dict[str, Any], run_dir: Path, format: str, sae_id: str | None = None) -> str:
    """The model card: what the SAE is, what it was trained on, its metrics, figures and config.

    Args:
        sae_id: the SAE's file, where its folder may hold others.
    """
    provenance = without_folders(provenance)
    header = {"tags": ["sparse-autoencoder", "interpretability", format], "library_name": "sae_lab"}
    model, sites = provenance.get("model", {}).get("name"), ", ".join(provenance.get("sites", []))
    lines = ["---", yaml.safe_dump(header).strip(), "---", "", f"# {type(sae).__name__} of {model} at {sites}", ""]
    lines += describe_roles(sae, provenance.get("sites", []))
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
    lines += [*metrics_table(run_dir / "metrics.json"), ""]
    lines += [f"![{file.stem}](figures/{file.name})" for file in sorted((run_dir / "figures").glob("*.png"))]
    if config_file(run_dir).is_file():
        config: Any = OmegaConf.to_container(read_config(run_dir))
        said = without_folders({name: value for name, value in config.items() if name not in MACHINES_OWN})
        lines += ["", "## Config", "", "```yaml", OmegaConf.to_yaml(OmegaConf.create(said)).strip(), "```"]
    return "\n".join([*lines, ""])


def describe_roles(sae: BaseSAE, sites: list[str]) -> list[str]:
    """Which sites a transcoder reads and which it predicts; nothing of an SAE, or where nobody knows the sites."""
    if not (sae.n_inputs and sites):
        return []
    names = [f"`{site}`" for site in sites]
    read, predicted = ", ".join(names[: sae.n_inputs]), ", ".join(names[sae.n_inputs :])
    return [f"A transcoder: from activations at {read} it predicts those at {predicted}, `sae.predict(x)`.", ""]


def without_folders(said: Any) -> Any:
    """Of every absolute path in a nested container its last part: where things lie is the machine's, not the SAE's."""
    if isinstance(said, dict):
        return {name: without_folders(value) for name, value in said.items()}
    if isinstance(said, list):
        return [without_folders(value) for value in said]
    return Path(said).name if isinstance(said, str) and said.startswith(("/", "~")) else said


def metrics_table(file: Path) -> list[str]:
    """metrics.json as Markdown, the names as in sae_lab/metrics.py; nothing where a run has none yet."""
    if not file.is_file():
        return []
    metrics = json.loads(file.read_text())
    rows = [f"| {name} | {format_number(value)} |" for name, value in metrics.items() if isinstance(value, int | float)]
    return ["## Metrics on held-out text", "", "| metric | value |", "|---|---|", *rows]
