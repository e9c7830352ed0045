"""Loggers: metrics.csv, with one row per logged step, and W&B."""

import csv
import io
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from sae_lab.evaluation.metrics import ACTIVATION_EDGES
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.runtime.files import write_atomically
from sae_lab.runtime.os_errors import naming, reason_of


class CSVLog(Logger):
    """Appends to `save_dir/metrics.csv`. A resumed run removes only the rows of the steps that it will repeat.

    (Lightning's own CSVLogger deletes the file of a run that it resumes.)
    """

    @check_arguments
    def __init__(self, save_dir: str):
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._rows: list[dict[str, Any]] | None = None
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the config is in .hydra/."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step} | {name: float(value) for name, value in metrics.items() if name != "epoch"}
        first = self._rows is None
        if self._rows is None:
            self._rows = self._read_rows_before(step or 0)
        self._rows.append(row)
        columns = ["step", *sorted({name for r in self._rows for name in r} - {"step"})]
        if first or columns != self._columns:
            self._columns = columns
            write_atomically(self.path, self._format_csv(self._rows, header=True).encode())
        else:
            with naming(self.path), self.path.open("a", newline="") as f:
                f.write(self._format_csv([row]))

    def _read_rows_before(self, step: int) -> list[dict[str, Any]]:
        """Return the rows of an existing file from before this step.

        Raises:
            UserError: the file is damaged. (Half a line at its end is none: a full disk leaves it, and it is repeated.)
        """
        if not self.path.is_file():
            return []
        try:
            whole, _, _ = self.path.read_text().rpartition("\n")
            rows = [{name: value for name, value in r.items() if value} for r in csv.DictReader(io.StringIO(whole))]
            kept = [r for r in rows if float(r["step"]) < step]
            for row in kept:
                [float(value) for value in row.values()]
        except (ValueError, KeyError, TypeError, csv.Error) as e:
            raise UserError(
                f"{self.path} is damaged ({reason_of(e)}): move it away, then type the same command again. The log "
                "begins anew, the run does not."
            ) from e
        return kept

    def _format_csv(self, rows: list[dict[str, Any]], header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


class WandbLog(WandbLogger):
    """Logs to a W&B run that belongs to this run alone, even if one process trains several SAEs.

    The id of the W&B run is kept in `save_dir/wandb/run_id`, so a resumed run continues it.

    Args:
        save_dir: the run folder.
        histograms: log histograms of the evaluation at the end: L0 per token, density of the latents, activations.
        artifacts: upload the SAE folder at the end, as an artifact of type `model` with the metrics as metadata.
        options: arguments of Lightning's WandbLogger.

    Raises:
        UserError: W&B does not start, usually because there is no API key.
    """

    @check_arguments
    def __init__(self, save_dir: str, histograms: bool = False, artifacts: bool = False, **options: Any):
        import wandb  # here, because the import takes a second

        self.run_dir, self.histograms, self.artifacts = Path(save_dir), histograms, artifacts
        id_file = Path(save_dir) / "wandb" / "run_id"
        if not id_file.is_file():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            id_file.write_text(uuid.uuid4().hex[:8])
        # By default Lightning reuses a W&B run that is open in this process; `create_new` prevents that.
        run_id = id_file.read_text()
        super().__init__(save_dir=save_dir, id=run_id, resume="allow", reinit="create_new", **options)
        try:
            _ = self.experiment  # starts W&B
        except wandb.Error as e:
            reason = first_line(e).partition(". ")[0].rstrip(".")
            raise UserError(
                f"W&B does not start ({reason}): type `wandb login`, or give logger.wandb.offline=true."
            ) from e

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status != "success":  # on success `conclude` ends the run, after the evaluation
            self.experiment.finish(exit_code=1)

    def conclude(self, metrics: dict[str, Any], tables: Mapping[str, pd.DataFrame]) -> None:
        """Write the evaluation into the W&B run's summary, which W&B's tables and sweeps read, and end the W&B run."""
        import wandb

        self.experiment.summary.update({f"eval/{name}": value for name, value in metrics.items()})
        if self.histograms:
            found = {f"eval/{name}": wandb.Histogram(np_histogram=h) for name, h in histograms_of(tables).items()}
            self.experiment.log(found)
        if self.artifacts:
            sae = wandb.Artifact(f"sae-{self.experiment.id}", type="model", metadata=dict(metrics))
            sae.add_dir(str(self.run_dir / "sae"))
            self.experiment.log_artifact(sae)
        self.experiment.finish()


def histograms_of(tables: Mapping[str, pd.DataFrame]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (counts, edges) of the tables of an evaluation: L0 per token, log10 of densities, log2 of activations.

    W&B takes at most 512 bins, so L0 is counted in that many.
    """
    l0, density = tables["l0_per_token"], tables["latent_density"]["density"].to_numpy(float)
    tokens = (l0["bos"] + l0["other"]).to_numpy(float)
    alive = np.log10(density[density > 0])
    edges = np.arange(0, l0["l0"].max() + 2) - 0.5
    found = {
        "l0_per_token": np.histogram(l0["l0"], edges if len(edges) <= 513 else 512, weights=tokens),
        "log10_density": np.histogram(alive, np.arange(-32, 1) / 4),
    }
    z = tables["activations"]
    return found | {"log2_activation": np.histogram(z["log2"], ACTIVATION_EDGES, weights=z["entries"].to_numpy(float))}


def finish_loggers(loggers: Iterable[Logger], metrics: dict[str, Any], tables: Mapping[str, pd.DataFrame]) -> None:
    """Send the evaluation to W&B. Other loggers get nothing, since its files are beside theirs."""
    for logger in loggers:
        if isinstance(logger, WandbLog):
            logger.conclude(metrics, tables)
