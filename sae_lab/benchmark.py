"""Time a training step against its lower bound, or the steps of a pursuit: `python -m sae_lab.benchmark`."""

from typing import Annotated, TypedDict

from annotated_types import Ge, Le
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/benchmark.yaml."""

    d_in: Annotated[int, Ge(1)]
    n_latents: Annotated[int, Ge(1)]
    n_sources: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)]
    seed: Annotated[int, Ge(0)]
    dead_share: Annotated[float, Ge(0), Le(1)]
    dense: bool
    repeats: Annotated[int, Ge(1)]
    k: Annotated[float, Ge(0)]
    device: str
    pursuit: str | None
    run_dir: str


@entry_point("benchmark")
def main(cfg: DictConfig) -> float:
    from sae_lab.studies.pursuit_cost import benchmark_pursuit
    from sae_lab.studies.step_cost import benchmark_step
    from sae_lab.training.options import check_optimizer

    check_config(cfg, Options)
    check_optimizer(cfg)
    return benchmark_step(cfg)["step_ms"] if cfg.pursuit is None else benchmark_pursuit(cfg)["ms"]["pursuit"]


if __name__ == "__main__":
    main()
