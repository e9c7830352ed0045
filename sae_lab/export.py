"""A run -> its SAE in the files of another library, with a model card: `python -m sae_lab.export run_dir=...`."""

import json
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from sae_lab.cli.entry import entry_point, folder_of
from sae_lab.interop import FORMATS, load_sae
from sae_lab.runtime.checks import checked_flag
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_atomically
from sae_lab.runtime.hub import hub_errors
from sae_lab.runtime.screen import figure, print_files
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import CONFIG, PROBE, WEIGHTS, sae_folder

OURS = "sae_lab"
MACHINES_OWN = ("run_dir", "logger")
"""Parts of a config that say nothing about the SAE, only where its files went."""
WRITERS = {name: format.write for name, format in FORMATS.items() if hasattr(format, "write")}


def export(run_dir: Path, format: str, out: Path) -> list[Path]:
    """Write the run's SAE, its figures and a card into `out`; returns the files.

    Raises:
        UserError: an unknown format, no SAE in the run, or one that the format has no form for.
    """
    if format not in (*WRITERS, OURS):
        raise UserError(f"format={format} is not known: choose one of {', '.join((*WRITERS, OURS))}.")
    source = sae_folder(run_dir)
    sae = load_sae(source)
    description = json.loads((source / CONFIG).read_text())
    sae_id = None
    if format == OURS:
        copy([source / name for name in (CONFIG, WEIGHTS, PROBE)], out)
    else:
        sae_id = WRITERS[format](sae, out, description["provenance"])
    copy(sorted((run_dir / "figures").glob("*.png")), out / "figures")
    write_atomically(out / "README.md", card(sae, description["provenance"], run_dir, format, sae_id).encode())
    return sorted(path for path in out.rglob("*") if path.is_file())


def copy(files: list[Path], folder: Path) -> None:
    for file in files:
        if file.is_file():
            write_atomically(folder / file.name, file.read_bytes())


def card(sae: BaseSAE, provenance: dict[str, Any], run_dir: Path, format: str, sae_id: str | None = None) -> str:
    """The model card: what the SAE is, what it was trained on, its metrics, figures and config.

    Args:
        sae_id: the SAE's file, where its folder may hold others.
    """
    provenance = without_folders(provenance)
    header = {"tags": ["sparse-autoencoder", "interpretability", format], "library_name": "sae_lab"}
    model, sites = provenance.get("model", {}).get("name"), ", ".join(provenance.get("sites", []))
    lines = ["---", yaml.safe_dump(header).strip(), "---", "", f"# {type(sae).__name__} of {model} at {sites}", ""]
    lines += roles(sae, provenance.get("sites", []))
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
    config_file = run_dir / ".hydra" / "config.yaml"
    if config_file.is_file():
        config: Any = OmegaConf.to_container(OmegaConf.load(config_file))
        said = without_folders({name: value for name, value in config.items() if name not in MACHINES_OWN})
        lines += ["", "## Config", "", "```yaml", OmegaConf.to_yaml(OmegaConf.create(said)).strip(), "```"]
    return "\n".join([*lines, ""])


def roles(sae: BaseSAE, sites: list[str]) -> list[str]:
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
    rows = [f"| {name} | {figure(value)} |" for name, value in metrics.items() if isinstance(value, int | float)]
    return ["## Metrics on held-out text", "", "| metric | value |", "|---|---|", *rows]


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder to the hub, making the repository if need be; returns its address.

    Args:
        private: whether a repository that is made is its owner's alone; one that exists stays what it is.

    Raises:
        UserError: the hub cannot be reached or refuses; the folder stays.
    """
    from huggingface_hub import HfApi

    refused = (
        f"{folder} is written, but was not pushed to {repository} ({{reason}}): log in with `hf auth login` and type "
        f"`hf upload {repository} {folder}{' --private' if private else ''}`."
    )
    with hub_errors(refused):
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))


@entry_point("export")
def main(cfg: DictConfig) -> None:
    run_dir, private = folder_of(cfg, "run_dir"), checked_flag("private", cfg.private)
    out = Path(cfg.out or run_dir / "export" / str(cfg.format))
    print_files(export(run_dir, cfg.format, out))
    if cfg.push_to_hub:
        print(push(out, cfg.push_to_hub, private))


if __name__ == "__main__":
    main()
