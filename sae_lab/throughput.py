"""Measure which stage limits a run, in tokens/s: `python -m sae_lab.throughput lm=... data=... sae=...`."""

from typing import Annotated, TypedDict

from annotated_types import Ge
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The slices that conf/throughput.yaml measures, and its folder."""

    slice_tokens: Annotated[int, Ge(1)]
    slices: Annotated[int, Ge(1)]
    run_dir: str


@entry_point("throughput")
def main(cfg: DictConfig) -> None:
    from sae_lab.studies.stage_rates import measure_throughput
    from sae_lab.training.options import check_optimizer, check_size

    check_config(cfg, Options)
    check_size(cfg)
    check_optimizer(cfg)
    measure_throughput(cfg)


if __name__ == "__main__":
    main()
