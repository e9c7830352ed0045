"""`hydra/sweeper=reach_l0`: search for the value of one option that gives a wanted L0."""

import json
import logging
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class ReachL0Sweeper(Sweeper):
    """Runs jobs one after the other and chooses each value from the results before it.

    The choices depend on the results only, so the same command into the same folder continues the search.

    Args:
        n_trials: maximum number of jobs.
        tolerance: the search ends when |l0 / goal_l0 - 1| is at most this.
    """

    def __init__(self, n_trials: int, tolerance: float):
        self.n_trials, self.tolerance = n_trials, tolerance

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the search.

        Raises:
            UserError: goal_l0 is missing, or not exactly one option has a range.
        """
        from sae_lab.runtime.errors import UserError  # here, because Hydra imports plug-ins even for `--help`
        from sae_lab.sweeps.search import next_guess

        assert self.config is not None
        if (goal := self.config.goal_l0) is None:
            raise UserError("hydra/sweeper=reach_l0 needs an L0 to reach: give goal_l0=...")
        key, low, high, fixed = parse_interval(arguments)
        assert self.launcher is not None
        tried: dict[float, float] = {}
        while len(tried) < self.n_trials and (number := next_guess(tried, goal, low, high)) is not None:
            [job] = self.launcher.launch([[*fixed, f"{key}={number}"]], initial_job_idx=len(tried))
            metrics = Path(job.hydra_cfg.hydra.runtime.output_dir) / "metrics.json"  # type: ignore[union-attr]
            if not metrics.is_file():
                return  # the job failed; the summary shows the reason
            tried[number] = json.loads(metrics.read_text())["l0"]
            log.info("%s=%s: l0 %.1f", key, number, tried[number])
            if abs(tried[number] / goal - 1) <= self.tolerance:
                return
        log.warning("l0 %s was not reached with %s between %s and %s in %d jobs.", goal, key, low, high, len(tried))


def parse_interval(arguments: list[str]) -> tuple[str, float, float, list[str]]:
    """Return the key whose value is `interval(low,high)`, low, high, and the other overrides.

    Raises:
        UserError: not exactly one key is swept, its value is not an interval, or not 0 < low < high.
    """
    from sae_lab.runtime.errors import UserError

    sweeps = [o for o in OverridesParser.create().parse_overrides(arguments) if o.is_sweep_override()]
    if len(sweeps) != 1 or not isinstance(interval := sweeps[0].value(), IntervalSweep):
        raise UserError(
            "hydra/sweeper=reach_l0 varies one number and nothing else: give its range, such as "
            "'sae.l1_coefficient=interval(1e-3,1)'."
        )
    low, high = interval.start, interval.end
    if low is None or high is None or not 0 < low < high:
        raise UserError(f"{sweeps[0].input_line}: a range must start above 0 and end above its start.")
    fixed = [a for a in arguments if a != sweeps[0].input_line]
    return sweeps[0].get_key_element(), float(low), float(high), fixed
