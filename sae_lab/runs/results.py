"""Write the results of an evaluation: metrics.json, tables and figures."""

import logging
from pathlib import Path
from typing import Any

import xxhash

from sae_lab import plots
from sae_lab.evaluation.evaluator import Evaluation
from sae_lab.evaluation.findings import check_metrics, find_problems
from sae_lab.runs.digests import METRICS, check_unaltered, recorded
from sae_lab.runs.facts import shared_facts
from sae_lab.runs.tables import read_numbers
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.runtime.files import format_json, read_json, write_atomically, write_json
from sae_lab.saes.base import BaseSAE

log = logging.getLogger(__name__)


def write_results(
    evaluation: Evaluation, sae: BaseSAE, run_dir: Path, suffix: str = "", facts: str | None = None
) -> list[Path]:
    """Write the tables and figures into `figures/`, then metrics.json, which marks the run as complete.

    Args:
        suffix: end of the names `figures` and `metrics`, for an evaluation that is not the run's own.
        facts: a line above every figure; None: the facts of the run in `run_dir`, if there is one.

    Raises:
        UserError: a metric is not finite; nothing is written.
    """
    check_metrics(evaluation.metrics)
    figures = run_dir / f"figures{suffix}"
    figures.mkdir(parents=True, exist_ok=True)
    for name, table in evaluation.tables.items():
        table.to_csv(figures / f"{name}.csv", index=False)
    said = shared_facts([run_dir]) if facts is None else facts
    tables, k = evaluation.tables, sae.config.get("k")
    written = [
        plots.l0_per_token(tables["l0_per_token"], figures / "l0_per_token.png", k, said),
        plots.latent_density(tables["latent_density"], figures / "latent_density.png", said),
        plots.activations(tables["activations"], figures / "activations.png", said),
    ]
    if "relative_norm" in tables:
        written.append(plots.relative_norm(tables["relative_norm"], figures / "relative_norm.png", said))
    if not suffix and (logged := read_numbers(run_dir / "metrics.csv", [])) is not None:
        written.append(plots.training_curves(logged, figures / "training.png", said))
    return [write_metrics(evaluation.metrics, sae, run_dir / f"metrics{suffix}.json"), *written]


def write_metrics(metrics: dict[str, Any], sae: BaseSAE, path: Path) -> Path:
    """Write the metrics, with the sizes of the SAE, as JSON. Warnings say what is left out or looks wrong.

    Raises:
        UserError: a metric is not finite; nothing is written.
    """
    check_metrics(metrics)
    metrics = metrics | {"n_latents": sae.n_latents, "d_in": sae.d_in, "n_sources": sae.n_sources}
    content = format_json(metrics)
    with recorded(path.parent, {path.name: xxhash.xxh3_128_hexdigest(content)}):
        write_atomically(path, content)
    for problem in find_problems(metrics):
        log.warning("%s: %s.", path.parent, problem)
    return path


def read_metrics(run_dir: Path) -> dict[str, Any]:
    """Read the metrics.json of a run folder.

    Raises:
        UserError: it is damaged.
    """
    check_unaltered(run_dir, METRICS)
    try:
        return read_json(run_dir / METRICS)
    except (OSError, ValueError) as e:
        raise UserError(f"{run_dir / METRICS} is damaged ({first_line(e)}): evaluate that run again.") from e


def write_comparison(metrics: dict[str, Any], encoder: str, k: int | None, folder: Path, suffix: str = "") -> Path:
    """Write the metrics of two encoders of one dictionary side by side, as JSON.

    Raises:
        UserError: a metric is not finite; nothing is written.
    """
    check_metrics(metrics)
    path = folder / f"metrics_{encoder}{'' if k is None else f'_k{k}'}{suffix}.json"
    write_json(path, metrics)
    for name, of_encoder in metrics.items():
        for problem in find_problems(of_encoder):
            log.warning("%s with encoder %s: %s.", folder, name, problem)
    return path
