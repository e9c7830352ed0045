"""Train an SAE on a known dictionary and report what it finds: `python -m sae_lab.planted sae=matryoshka`."""

from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point, section_from


@entry_point("planted")
def main(cfg: DictConfig) -> float:
    from sae_lab.studies.recovery import measure_recovery

    section_from(cfg, "planted")
    return measure_recovery(cfg)["mcc"]


if __name__ == "__main__":
    main()
