"""Start and end of a sweep: `jobs.txt`, the final table and the exit code."""

import sys
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sae_lab.cli.entry import remember_folder
from sae_lab.runtime.files import write_atomically
from sae_lab.runtime.os_errors import reason_of
from sae_lab.runtime.screen import console
from sae_lab.sweeps.composition import hydra_config
from sae_lab.sweeps.search import describe_best
from sae_lab.sweeps.status import PLAN, UNREADABLE, job_statuses, planned_jobs, show_statuses


class SweepSummary(Callback):
    """Writes the planned jobs to `jobs.txt`; at the end prints a table of them, and exits with 1 if any job failed.

    A search plans no jobs: each is added to the file when it starts, in whichever process that is.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        remember_folder(f"hydra.sweep.dir={config.hydra.sweep.dir}")
        self.names = plan_job_names(config)
        plan = Path(config.hydra.sweep.dir) / PLAN
        try:
            write_atomically(plan, "".join(f"{name}\n" for name in self.names).encode())
        except OSError as e:  # Hydra would warn of an exception of a callback, with its place in the code, and go on
            sys.exit(f"train: {reason_of(e)}")

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN and not is_grid(config):
            with (Path(config.hydra.sweep.dir) / PLAN).open("a") as plan:
                plan.write(f"{config.hydra.sweep.subdir}\n")

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        root = Path(config.hydra.sweep.dir)
        # A grid's from memory: another sweep may have written its own plan into the folder meanwhile.
        folders = [root / name for name in self.names] or planned_jobs(root)
        jobs = job_statuses(root, folders)
        show_statuses(jobs)
        if not is_grid(config) and (sentence := describe_best(folders, config.get("goal_l0"))):
            console.print(sentence, highlight=False, markup=False, soft_wrap=True)
        if any(job.status in ("failed", UNREADABLE) for job in jobs):
            sys.exit(1)


def plan_job_names(config: DictConfig) -> list[str]:
    """Return the folder names of the jobs that Hydra's grid sweeper will start; empty for a search.

    Does not compose the config of each job, which would take a third of a second per job.
    """
    if not is_grid(config):
        return []
    parser = OverridesParser.create()
    # Unresolved: `lm.name=${oc.env:MODEL}` is a job's name as it was typed, never the value.
    task: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    overrides = parser.parse_overrides(task)
    [jobs] = BasicSweeper.split_arguments(overrides, None)
    named = dict(config.hydra.job.config.override_dirname)
    names, job_config = [], config.copy()
    OmegaConf.set_readonly(job_config.hydra.job, False)
    with open_dict(job_config), hydra_config(job_config):
        for i, job in enumerate(jobs):
            job_config.hydra.job.override_dirname = get_overrides_dirname(parser.parse_overrides(job), **named)
            job_config.hydra.job.num = job_config.hydra.job.id = i
            names.append(str(OmegaConf.select(job_config, "hydra.sweep.subdir")))
    return names


def is_grid(config: DictConfig) -> bool:
    """Return whether this is a grid, whose jobs are all known from the start, and not a search."""
    return config.hydra.sweeper._target_.endswith(".BasicSweeper")
