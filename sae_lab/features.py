"""Write a searchable page about an SAE's latents: `python -m sae_lab.features sae=outputs/...`."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

from annotated_types import Ge
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point
from sae_lab.cli.replaced import allow_new_keys, open_from
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/features.yaml."""

    sae_id: str | None
    out: str | None
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
    from sae_lab.runs.replacements import suffix_of
    from sae_lab.runtime.memory import keep_freed_memory
    from sae_lab.runtime.screen import print_files

    check_config(cfg, Options)
    keep_freed_memory()
    opened = open_from(cfg)
    sae, data = opened.sae, require_text(opened.data, "features")
    suffix = "" if cfg.overwrite else suffix_of(opened.settings)
    latents = choose_latents(sae, cfg.latents, cfg.n_latents)
    sizes = {name: cfg[name] for name in ("n_tokens", "n_top", "n_random", "context", "n_logits", "n_neighbours")}
    description = {"run": opened.name} | describe_latents(sae, data, latents, **sizes)
    print_files(write_page(description, opened.folder / f"features{suffix}"))


if __name__ == "__main__":
    main()
