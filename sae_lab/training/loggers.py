"""Where training figures go: metrics.csv, one row a logging step, and W&B."""

import csv
import io
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from sae_lab.runtime.errors import UserError, first_line
from sae_lab.runtime.files import write_atomically


class CSVLog(Logger):
    """Appends to `save_dir/metrics.csv`; a resumed run drops the rows that it will log again, and keeps the others.

    (Lightning's own CSVLogger deletes the file of the run it continues.)
    """

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
        """The config is in .hydra/ already."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step} | {name: float(value) for name, value in metrics.items() if name != "epoch"}
        first = self._rows is None
        if self._rows is None:
            self._rows = self._earlier(step or 0)
        self._rows.append(row)
        columns = ["step", *sorted({name for r in self._rows for name in r} - {"step"})]
        if first or columns != self._columns:
            self._columns = columns
            write_atomically(self.path, self._text(self._rows, header=True).encode())
        else:
            with self.path.open("a", newline="") as f:
                f.write(self._text([row]))

    def _earlier(self, step: int) -> list[dict[str, Any]]:
        """The rows of the file, if there is one, from before this step."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as f:
            rows = [{name: value for name, value in r.items() if value} for r in csv.DictReader(f)]
        return [r for r in rows if float(r["step"]) < step]

    def _text(self, rows: list[dict[str, Any]], header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


class WandbLog(WandbLogger):
    """A W&B run of this run's own, whatever others the process has: a sweep trains many in one.

    Its id is kept in `save_dir/wandb/run_id`, so a resumed run goes on in the same one.

    Raises:
        UserError: W&B does not start, most often for want of a key.
    """

    def __init__(self, save_dir: str, **options: Any):
        import wandb  # here: runs without it would wait for a second

        id_file = Path(save_dir) / "wandb" / "run_id"
        if not id_file.is_file():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            id_file.write_text(uuid.uuid4().hex[:8])
        # Lightning takes up a run that W&B has open in this process; one made by `create_new` is nobody else's.
        run_id = id_file.read_text()
        super().__init__(save_dir=save_dir, id=run_id, resume="allow", reinit="create_new", **options)
        try:
            _ = self.experiment  # W&B starts where this is asked for
        except wandb.Error as e:
            reason = first_line(e).partition(". ")[0].rstrip(".")
            raise UserError(
                f"W&B does not start ({reason}): type `wandb login`, or give logger.wandb.offline=true."
            ) from e

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status != "success":  # else the evaluation is still to come
            self.experiment.finish(exit_code=1)

    def conclude(self, metrics: dict[str, Any]) -> None:
        """Put the evaluation into the run's summary, where W&B's tables and sweeps look, and end the run."""
        self.experiment.summary.update({f"eval/{name}": value for name, value in metrics.items()})
        self.experiment.finish()


def finish_loggers(loggers: Iterable[Logger], metrics: dict[str, Any]) -> None:
    """Tell W&B how the run ended; the other loggers' files lie beside metrics.json."""
    for logger in loggers:
        if isinstance(logger, WandbLog):
            logger.conclude(metrics)
