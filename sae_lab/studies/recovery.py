"""Train an SAE on planted features, and measure what of them it recovers."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from rich.console import Group
from rich.table import Table
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from sae_lab import plots
from sae_lab.evaluation.metrics import ReconstructionMetrics
from sae_lab.runtime.build import build
from sae_lab.runtime.checks import check_config
from sae_lab.runtime.device import resolve_device
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_json
from sae_lab.runtime.memory import keep_freed_memory
from sae_lab.runtime.screen import console, format_number, print_files, print_metrics, track, under
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import save_sae
from sae_lab.studies.known_truth import FOUND, Firing, Matching, feature_table
from sae_lab.studies.planted_rows import PlantedRows, Rows
from sae_lab.training.options import check_optimizer
from sae_lab.training.rate import resolve_rate
from sae_lab.training.run import has_frozen_dictionary
from sae_lab.training.step import TrainingStep

CALIBRATION_BATCHES = 20
EVALUATION_BATCH = 1024
LEVEL_COLUMNS = ("features", "frequency", "cosine", "found", "absorbed")


class Options(TypedDict):
    """The top-level options of conf/planted.yaml."""

    n_latents: Annotated[int, Ge(1)]
    n_steps: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)]
    n_eval_rows: Annotated[int, Ge(2)]
    seed: Annotated[int, Ge(0)]
    device: str
    run_dir: str


class Recovery(NamedTuple):
    """Figures by name, the figures of each level, and one row per feature."""

    figures: dict[str, float]
    levels: pd.DataFrame
    features: pd.DataFrame


def measure_recovery(cfg: DictConfig) -> dict[str, Any]:
    """Train an SAE on planted features and write what it recovers: planted.json, tables, a figure and the SAE."""
    keep_freed_memory()
    check_config(cfg, Options)
    check_optimizer(cfg)
    device = resolve_device(cfg.device)
    planted: PlantedRows = build(cfg, "planted", device=device)
    sae = build_sae(cfg, planted).to(device)
    rate = resolve_rate(cfg.optimizer, sae.d_in, sae.n_latents, cfg.n_steps)
    optimizer = build(cfg, "optimizer", **rate)([p for p in sae.parameters() if p.requires_grad])
    schedule = LambdaLR(optimizer, partial(build(cfg, "schedule"), n_steps=cfg.n_steps))
    train_on_planted(sae, planted, optimizer, schedule, cfg.n_steps, cfg.batch_size, seed=cfg.seed + 1)
    found = recovery(sae, planted, cfg.n_eval_rows)
    write_recovery(found, sae, cfg)
    return found.figures


def build_sae(cfg: DictConfig, planted: PlantedRows) -> BaseSAE:
    """Build the SAE of a config.

    Raises:
        UserError: it could not find planted features.
    """
    if (active := cfg.planted.get("active", 0)) > cfg.n_latents:  # else the error would name k, which is not set
        raise UserError(f"planted.active={active} is more than n_latents={cfg.n_latents}: change one of them.")
    sae: BaseSAE = build(cfg, "sae", d_in=planted.d_in, n_latents=cfg.n_latents, n_sources=planted.n_sites)
    if sae.n_inputs:
        raise UserError(
            "planted features lie on one site each, so a transcoder has nothing to predict: leave n_inputs=0."
        )
    if has_frozen_dictionary(sae):
        raise UserError("frozen_decoder=true would freeze a random dictionary, which finds nothing: leave it out.")
    return sae


def train_on_planted(
    sae: BaseSAE,
    planted: PlantedRows,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    n_steps: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train on newly drawn rows without Lightning, then calibrate."""
    step = TrainingStep(sae.train(), optimizer)
    for i in track(range(n_steps), "training on planted features"):
        step(planted.rows_at(i * batch_size, batch_size, seed).x)
        schedule.step()
    for i in range(CALIBRATION_BATCHES):
        sae.calibrate(planted.rows_at((n_steps + i) * batch_size, batch_size, seed).x, i)


@torch.no_grad()
def recovery(sae: BaseSAE, planted: PlantedRows, n_rows: int = 8192) -> Recovery:
    """Measure how much of the planted dictionary the SAE has, and how it codes new rows under its deployed rule.

    docs/planted.md defines each figure.
    """
    sae.eval()
    matching = Matching.of(sae, planted)
    firing, metrics = Firing(matching), ReconstructionMetrics(sae.n_latents).to(planted.device)
    routed, norms = [], []
    for rows, x in evaluation_rows(planted, n_rows):
        x_hat, code = sae.autoencode(rows.x)
        x_hat = x_hat[torch.arange(len(x)), rows.site]
        dense = code if isinstance(code, Tensor) else code.to_dense()
        metrics.update(x, x_hat, code)
        firing.update(dense != 0, rows.strengths > 0)
        norms.append(x_hat.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-6))
        if (covers := sae.predicted_mask(rows.x)) is not None:
            routed.append(covers[torch.arange(len(x)), rows.site].float())
    table = feature_table(firing)
    measured = metrics.compute()
    figures = found_figures(table, planted, sae.n_latents) | matching.figures() | firing.figures()
    figures |= {name: measured[name] for name in ("l0", "fvu", "dead_fraction") if name in measured}
    figures["shrinkage"] = torch.cat(norms).mean()
    if routed:
        figures["routed"] = torch.cat(routed).mean()
    return Recovery({name: float(value) for name, value in figures.items()}, level_table(table, planted), table)


def evaluation_rows(planted: PlantedRows, n_rows: int) -> Iterator[tuple[Rows, Float[Tensor, "b d"]]]:
    """Yield batches of rows that no training has seen, each with the activations at the features' site."""
    for start in range(0, n_rows, EVALUATION_BATCH):
        rows = planted.rows_at(start, min(EVALUATION_BATCH, n_rows - start), planted.seed + 10**6)
        yield rows, rows.x[torch.arange(len(rows.site)), rows.site]


def found_figures(table: pd.DataFrame, planted: PlantedRows, n_latents: int) -> dict[str, float]:
    """Return the figures of the largest cosine of each feature: of all, of roots and of children."""
    figures = {"mmcs": table["max_cosine"].mean(), "found": (table["max_cosine"] > FOUND).mean()}
    for name in ("roots", "children"):
        part = table.iloc[planted.levels[name]]
        if len(part):
            found = part["max_cosine"] > FOUND
            figures |= {f"mmcs_{name}": part["max_cosine"].mean(), f"found_{name}": found.mean()}
            if found.any():
                figures[f"place_{name}"] = part["best_latent"][found].mean() / n_latents
    return figures


def level_table(table: pd.DataFrame, planted: PlantedRows) -> pd.DataFrame:
    """Return means over the features of each level; `cosine` is that with the matched latent, 0 without one."""
    parts = {name: table.iloc[part] for name, part in planted.levels.items()}
    rows = [
        (name, len(p), p["frequency"].mean(), p["cosine"].mean(), (p["cosine"] > FOUND).mean(), p["absorbed"].mean())
        for name, p in parts.items()
        if len(p)
    ]
    return pd.DataFrame(rows, columns=["level", *LEVEL_COLUMNS])


def write_recovery(found: Recovery, sae: BaseSAE, cfg: DictConfig) -> None:
    """Print the figures, and write them, the tables, the plot and the SAE into the run folder."""
    run_dir = Path(cfg.run_dir)
    print_metrics(found.figures, run_dir)
    console.print(levels_for_screen(found.levels))
    save_sae(sae, run_dir / "sae")
    (run_dir / "figures").mkdir(parents=True, exist_ok=True)
    found.features.to_csv(run_dir / "figures" / "features.csv", index=False)
    figure = plots.recovery_by_frequency(found.features, run_dir / "figures" / "recovery.png")
    levels = found.levels.set_index("level").to_dict("index")
    settings = {"config": OmegaConf.to_container(cfg, resolve=True)}
    write_json(run_dir / "planted.json", found.figures | {"levels": levels} | settings)
    print_files([run_dir / "planted.json", figure])


def levels_for_screen(levels: pd.DataFrame) -> Group:
    """Return the figures of each level as a table."""
    table = Table()
    for column in levels.columns:
        table.add_column(column, justify="left" if column == "level" else "right")
    for row in levels.itertuples(index=False):
        table.add_row(row[0], *map(format_number, row[1:]))
    return under("by level", table)
