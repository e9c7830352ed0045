"""Train an SAE, `python -m sae_lab.train`: compose, build data, module and trainer, fit, calibrate, save, evaluate."""

from contextlib import nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point
from sae_lab.cli.folder_names import leave_out_constants


@entry_point("train", leave_out_constants)
def main(cfg: DictConfig) -> float | None:
    from sae_lab.parallel.environment import is_first
    from sae_lab.sweeps.failures import failure_recorded
    from sae_lab.sweeps.search import search_score
    from sae_lab.training.run import train_run

    folder = Path(cfg.run_dir) if HydraConfig.get().mode == RunMode.MULTIRUN and is_first() else None
    with nullcontext() if folder is None else failure_recorded(folder):  # one job's failure must not end a sweep
        metrics = train_run(cfg)
        return search_score(metrics, cfg.goal_l0) if metrics else None
    return None  # not nan, over which Optuna's sweeper breaks


if __name__ == "__main__":
    main()
