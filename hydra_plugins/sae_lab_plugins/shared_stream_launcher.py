"""`hydra/launcher=shared_stream`: jobs of a sweep that read the same activations share one pass over the LM."""

import logging
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus, configure_log, env_override, filter_overrides, setup_globals
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
        from sae_lab.sweeps.composition import SharedComposition

        # The sweeper has the same context, and composes every job before the first starts.
        hydra_context.config_loader = SharedComposition(hydra_context.config_loader)
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from sae_lab.sweeps.gpus import train_on_gpus  # here, because Hydra imports plug-ins even for `--help`
        from sae_lab.sweeps.shared_stream import score_of

        setup_globals()
        log.info("Launching %d jobs on shared streams", len(job_overrides))
        returns = [self.compose(list(job), initial_job_idx + i) for i, job in enumerate(job_overrides)]
        jobs = [r.return_value for r in returns]
        last = returns[-1].hydra_cfg
        assert last is not None
        job_logging = OmegaConf.to_container(last.hydra.job_logging, resolve=True)
        train_on_gpus([job for job in jobs if job is not None], self.max_members, self.parallel, job_logging)
        for r, job in zip(returns, jobs, strict=True):
            r.return_value = None if job is None else score_of(job)
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return returns

    def compose(self, overrides: list[str], number: int) -> JobReturn:
        """Run Hydra's part of a job. The return value is the job to train, or None if its config is invalid.

        Does what Hydra's `run_job` does, without its four copies of the config: 20 of 40 ms per job.
        """
        from sae_lab.cli.unknown_key import check_added
        from sae_lab.sweeps.composition import hydra_config
        from sae_lab.sweeps.failures import failure_recorded
        from sae_lab.training.job import read_job

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        log.info("\t#%d : %s", number, " ".join(filter_overrides(overrides)))
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config), hydra_config(config), env_override(config.hydra.job.env_set):
            config.hydra.job.id = config.hydra.job.num = number
            folder = Path(config.hydra.sweep.dir, str(config.hydra.sweep.subdir)).absolute()
            config.hydra.runtime.output_dir = str(folder)
            folder.mkdir(parents=True, exist_ok=True)
            configure_log(config.hydra.job_logging, config.hydra.verbose)
            job = JobReturn(overrides, hydra_cfg=config, task_name=config.hydra.job.name)
            self.hydra_context.callbacks.on_job_start(config=config, task_function=read_job)
            with failure_recorded(folder):
                task = without_hydra(config)
                check_added(task, config.hydra.job.config_name, filter_overrides(overrides))
                job.return_value = read_job(task)
            job.status = JobStatus.COMPLETED
            self.hydra_context.callbacks.on_job_end(config=config, job_return=job)
        return job


def without_hydra(config: DictConfig) -> DictConfig:
    """Return the config that the task sees."""
    task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    OmegaConf.copy_cache(config, task)
    return task
