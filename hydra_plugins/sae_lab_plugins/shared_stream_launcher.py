"""`hydra/launcher=shared_stream`: jobs of a sweep that read the same activations share one pass over the LM."""

import logging
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)


class SharedStreamLauncher(Launcher):
    """Composes every job like Hydra's basic launcher, then trains all jobs together with sae_lab.sweeps.gpus.

    Args:
        max_members: SAEs that share one pass; None: as many as the memory holds.
        parallel: groups that train at a time, each on its own GPU; `auto`: one per GPU.
    """

    def __init__(self, max_members: int | None, parallel: int | str):
        self.max_members, self.parallel = max_members, parallel

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from sae_lab.sweeps.gpus import train_on_gpus  # here, because Hydra imports plug-ins even for `--help`

        setup_globals()
        log.info("Launching %d jobs on shared streams", len(job_overrides))
        returns = [self.compose(list(job), initial_job_idx + i) for i, job in enumerate(job_overrides)]
        jobs = [r.return_value for r in returns]
        last = returns[-1].hydra_cfg
        assert last is not None
        job_logging = OmegaConf.to_container(last.hydra.job_logging, resolve=True)
        train_on_gpus([job for job in jobs if job is not None], self.max_members, self.parallel, job_logging)
        for r, job in zip(returns, jobs, strict=True):
            r.return_value = None if job is None else job.score()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return returns

    def compose(self, overrides: list[str], number: int) -> JobReturn:
        """Run Hydra's part of a job. The return value is the job to train, or None if its config is invalid."""
        from sae_lab.sweeps.failures import failure_recorded
        from sae_lab.sweeps.shared_stream import read_job

        def read(cfg: DictConfig):
            with failure_recorded(Path(cfg.run_dir)):
                return read_job(cfg)

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return run_job(
            hydra_context=self.hydra_context,
            task_function=read,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
