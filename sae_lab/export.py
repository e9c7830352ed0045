"""Write an SAE in another library's files, with a model card: `python -m sae_lab.export sae=...`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from annotated_types import Ge
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point
from sae_lab.cli.replaced import allow_new_keys, open_from, source_from, typed_options, typed_settings
from sae_lab.runtime.checks import check_config
from sae_lab.runtime.errors import UserError

SIZES = ("n_tokens", "n_top", "n_random", "context", "n_logits", "n_neighbours")
NAMES = ("model", "layer", "source_set", "release", "creator")
OF_DASHBOARDS = ("latents", "n_latents", *SIZES, *NAMES)


class Options(TypedDict):
    """The options of conf/export.yaml."""

    sae_id: str | None
    format: str
    out: str | None
    push_to_hub: str | None
    private: bool
    n_latents: Annotated[int, Ge(1)] | None
    n_tokens: Annotated[int, Ge(1)]
    n_top: Annotated[int, Ge(0)]
    n_random: Annotated[int, Ge(0)]
    context: Annotated[int, Ge(0)]
    n_logits: Annotated[int, Ge(0)]
    n_neighbours: Annotated[int, Ge(0)]
    model: str | None
    layer: Annotated[int, Ge(0)] | None
    source_set: str | None
    release: str | None
    creator: str | None
    device: str
    trust: Sequence[str] | str


@entry_point("export", allow_new_keys)
def main(cfg: DictConfig) -> None:
    from sae_lab.runs.dashboards import DASHBOARDS
    from sae_lab.runs.export import check_format, describe_upload, export_sae, push_to_hub
    from sae_lab.runs.opening import settings_of_numbers
    from sae_lab.runs.replacements import suffix_of
    from sae_lab.runs.result_folders import home_of
    from sae_lab.runtime.plain_text import for_terminal
    from sae_lab.runtime.screen import print_files

    check_config(cfg, Options)
    source, typed = source_from(cfg), typed_options(cfg, *OF_DASHBOARDS)
    if typed and cfg.format not in DASHBOARDS:
        check_format(cfg.format)
        raise UserError(
            f"{', '.join(typed)} {'is' if len(typed) == 1 else 'are'} of format={' and format='.join(DASHBOARDS)}, and "
            f"format={cfg.format} exports the whole SAE: leave it out, or choose one of these formats."
        )
    suffix = suffix_of(typed | settings_of_numbers(typed_settings(), None)) if cfg.format in DASHBOARDS else ""
    out = Path(cfg.out or home_of(source, cfg.sae_id) / "export" / f"{cfg.format}{suffix}")
    files = show_latents(cfg, out) if cfg.format in DASHBOARDS else export_sae(source, cfg.format, out, cfg.sae_id)
    print_files(files)
    if cfg.push_to_hub:
        print(for_terminal(describe_upload(out, files, cfg.push_to_hub, cfg.private)), flush=True)
        print(push_to_hub(out, files, cfg.push_to_hub, cfg.private))


def show_latents(cfg: DictConfig, out: Path) -> list[Path]:
    """Write what the latents respond to and promote, for which the language model reads its text."""
    from sae_lab.activations.building import require_text
    from sae_lab.evaluation.latents import choose_latents
    from sae_lab.runs.dashboards import Names
    from sae_lab.runs.export import export_dashboards
    from sae_lab.runtime.memory import keep_freed_memory

    keep_freed_memory()
    opened = open_from(cfg)
    data = require_text(opened.data, f"export format={cfg.format}")
    latents = choose_latents(opened.sae, cfg.latents, cfg.n_latents or opened.sae.n_latents)
    sizes = {name: cfg[name] for name in SIZES}
    names = Names(*(cfg[name] for name in NAMES))
    return export_dashboards(source_from(cfg), cfg.sae_id, opened.sae, data, latents, cfg.format, out, names, sizes)


if __name__ == "__main__":
    main()
