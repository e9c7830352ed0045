"""Write a searchable page about a run's latents: `python -m sae_lab.features run_dir=outputs/...`."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

from annotated_types import Ge
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point, folder_from
from sae_lab.cli.replaced import allow_new_keys, replaced_from
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/features.yaml."""

    n_latents: Annotated[int, Ge(1)]
    n_tokens: Annotated[int, Ge(1)]
    n_top: Annotated[int, Ge(0)]
    n_random: Annotated[int, Ge(0)]
    context: Annotated[int, Ge(0)]
    n_logits: Annotated[int, Ge(0)]
    n_neighbours: Annotated[int, Ge(0)]
    device: str
    trust: Sequence[str] | str
    overwrite: bool


@entry_point("features", allow_new_keys)
def main(cfg: DictConfig) -> None:
    from sae_lab.activations.building import require_text
    from sae_lab.evaluation.latents import choose_latents, describe_latents
    from sae_lab.plots.feature_page import write_page
    from sae_lab.runs.config import read_config
    from sae_lab.runs.loading import load_run
    from sae_lab.runs.replacements import replaced_settings, suffix_of
    from sae_lab.runtime.memory import keep_freed_memory
    from sae_lab.runtime.screen import print_files

    run_dir = folder_from(cfg, "run_dir")
    check_config(cfg, Options)
    keep_freed_memory()
    sae, data, run = load_run(run_dir, cfg.device, trust=cfg.trust, replace=replaced_from(cfg))
    suffix = "" if cfg.overwrite else suffix_of(replaced_settings(read_config(run_dir), run))
    data = require_text(data, "features")
    latents = choose_latents(sae, cfg.latents, cfg.n_latents)
    sizes = {name: cfg[name] for name in ("n_tokens", "n_top", "n_random", "context", "n_logits", "n_neighbours")}
    description = {"run": run_dir.name} | describe_latents(sae, data, latents, **sizes)
    print_files(write_page(description, run_dir / f"features{suffix}"))


if __name__ == "__main__":
    main()
