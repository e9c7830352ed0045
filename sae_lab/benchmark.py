"""Time a training step against its floor, or a pursuit's steps: `python -m sae_lab.benchmark`."""

from omegaconf import DictConfig

from sae_lab.cli.entry import check_whole_numbers, entry_point
from sae_lab.runtime.checks import checked_flag, checked_number
from sae_lab.studies.pursuit_cost import benchmark_pursuit
from sae_lab.studies.step_cost import benchmark_step


@entry_point("benchmark")
def main(cfg: DictConfig) -> float:
    check_whole_numbers(cfg, {"d_in": 1, "n_latents": 1, "n_sources": 1, "batch_size": 1, "repeats": 1, "seed": 0})
    checked_number("dead_share", cfg.dead_share, 0, at_most=1)
    checked_flag("dense", cfg.dense)
    return benchmark_step(cfg)["step_ms"] if cfg.pursuit is None else benchmark_pursuit(cfg)["ms"]["pursuit"]


if __name__ == "__main__":
    main()
