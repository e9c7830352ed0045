"""Write a searchable page about an SAE's latents: `python -m sae_lab.features sae=outputs/...`."""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, TypedDict

from annotated_types import Ge, Le
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point
from sae_lab.cli.replaced import allow_new_keys, open_from, typed_options
from sae_lab.runtime.checks import check_config

SIZES = ("n_tokens", "n_top", "n_random", "n_per_decile", "context", "n_logits", "n_neighbours")
CHOICE = ("latents", "n_latents")


class Options(TypedDict):
    """The options of conf/features.yaml."""

    sae_id: str | None
    out: str | None
    n_latents: Annotated[int, Ge(1)]
    n_tokens: Annotated[int, Ge(1)]
    n_top: Annotated[int, Ge(0)]
    n_random: Annotated[int, Ge(0)]
    n_per_decile: Annotated[int, Ge(0)]
    context: Annotated[int, Ge(0)]
    n_logits: Annotated[int, Ge(0)]
    n_neighbours: Annotated[int, Ge(0)]
    text: str | None
    serve: bool
    port: Annotated[int, Ge(0), Le(65535)]
    device: str
    trust: Sequence[str] | str
    overwrite: bool


@entry_point("features", allow_new_keys)
def main(cfg: DictConfig) -> None:
    from sae_lab.activations.building import require_text
    from sae_lab.evaluation.latents import choose_latents, describe_latents
    from sae_lab.evaluation.own_text import describe_text, name_of_text
    from sae_lab.plots.feature_page import write_page
    from sae_lab.plots.page_server import start_server
    from sae_lab.runs.replacements import suffix_of
    from sae_lab.runtime.memory import keep_freed_memory
    from sae_lab.runtime.screen import print_activations, print_files

    check_config(cfg, Options)
    keep_freed_memory()
    opened = open_from(cfg)
    sae, data = opened.sae, require_text(opened.data, "features")
    suffix = "" if cfg.overwrite else suffix_of(typed_options(cfg, *CHOICE, *SIZES) | opened.settings)
    description: dict[str, Any] = {"run": opened.name, "served": cfg.serve}
    chosen = cfg.latents
    if cfg.text is not None:
        own = description["own"] = describe_text(sae, data, cfg.text)
        suffix += name_of_text(cfg.text)
        if chosen is None:
            chosen = [row["latent"] for row in own["latents"]] or None
        print_activations(own)
    latents = choose_latents(sae, chosen, cfg.n_latents)
    folder = opened.folder / f"features{suffix}"
    server = start_server(folder, partial(describe_text, sae, data), cfg.port) if cfg.serve else None
    print_files(write_page(description | describe_latents(sae, data, latents, **{k: cfg[k] for k in SIZES}), folder))
    if server is not None:
        print(f"http://{server.names[0]}/ answers until Ctrl-C.", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
