"""Measure which stage limits a run, in tokens/s: `python -m sae_lab.throughput lm=... data=... sae=...`."""

from omegaconf import DictConfig

from sae_lab.cli.entry import check_whole_numbers, entry_point
from sae_lab.studies.stage_rates import measure_throughput


@entry_point("throughput")
def main(cfg: DictConfig) -> None:
    check_whole_numbers(cfg, {"slice_tokens": 1, "slices": 1})
    measure_throughput(cfg)


if __name__ == "__main__":
    main()
