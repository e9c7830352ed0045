"""Write a searchable page about a run's latents: `python -m sae_lab.features run_dir=outputs/...`."""

from typing import Annotated, TypedDict

from annotated_types import Ge
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point, folder_from
from sae_lab.evaluation.latents import (
    choose_latents,
    describe_activations,
    describe_directions,
    gather_activations,
    spell_tokens,
)
from sae_lab.plots.feature_page import write_page
from sae_lab.runs.loading import load_run
from sae_lab.runtime.checks import check_config
from sae_lab.runtime.memory import keep_freed_memory
from sae_lab.runtime.screen import print_files


class Dials(TypedDict):
    """The numbers of conf/features.yaml."""

    n_latents: Annotated[int, Ge(1)]
    n_tokens: Annotated[int, Ge(1)]
    n_top: Annotated[int, Ge(0)]
    n_random: Annotated[int, Ge(0)]
    context: Annotated[int, Ge(0)]
    n_logits: Annotated[int, Ge(0)]
    n_neighbours: Annotated[int, Ge(0)]


@entry_point("features")
def main(cfg: DictConfig) -> None:
    run_dir = folder_from(cfg, "run_dir")
    check_config(cfg, Dials)
    keep_freed_memory()
    sae, data, _ = load_run(run_dir, cfg.device)
    latents = choose_latents(sae, cfg.latents, cfg.n_latents)
    activations = gather_activations(sae, data, latents, cfg.n_tokens)
    found = describe_activations(activations, len(latents), n_top=cfg.n_top, n_random=cfg.n_random, context=cfg.context)
    meanings = describe_directions(sae, data.lm, latents, cfg.n_logits, cfg.n_neighbours)
    found = [{"latent": i} | a | b for i, a, b in zip(latents.tolist(), found, meanings, strict=True)]
    description = {
        "run": run_dir.name,
        "sae": type(sae).__name__,
        "n_latents": sae.n_latents,
        "lm": data.lm.name,
        "sites": list(data.lm.sites),
        "n_tokens": activations.n_positions,
        "tokens": spell_tokens(data.lm.tokenizer, found),
        "latents": found,
    }
    print_files(write_page(description, run_dir / "features"))


if __name__ == "__main__":
    main()
