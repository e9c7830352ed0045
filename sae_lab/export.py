"""Write a run's SAE in another library's files, with a model card: `python -m sae_lab.export run_dir=...`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from annotated_types import Ge
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point, folder_from
from sae_lab.cli.replaced import allow_new_keys, replaced_from
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/export.yaml."""

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
    from sae_lab.runs.export import describe_upload, export_run, push_to_hub
    from sae_lab.runtime.plain_text import for_terminal
    from sae_lab.runtime.screen import print_files

    check_config(cfg, Options)
    run_dir = folder_from(cfg, "run_dir")
    out = Path(cfg.out or run_dir / "export" / str(cfg.format))
    files = show_latents(cfg, run_dir, out) if cfg.format in DASHBOARDS else export_run(run_dir, cfg.format, out)
    print_files(files)
    if cfg.push_to_hub:
        print(for_terminal(describe_upload(out, files, cfg.push_to_hub, cfg.private)), flush=True)
        print(push_to_hub(out, files, cfg.push_to_hub, cfg.private))


def show_latents(cfg: DictConfig, run_dir: Path, out: Path) -> list[Path]:
    """Write what the latents respond to and promote, for which the language model reads its text."""
    from sae_lab.activations.building import require_text
    from sae_lab.evaluation.latents import choose_latents
    from sae_lab.runs.dashboards import Names
    from sae_lab.runs.export import export_dashboards
    from sae_lab.runs.loading import load_run
    from sae_lab.runtime.memory import keep_freed_memory

    keep_freed_memory()
    sae, data, _ = load_run(run_dir, cfg.device, trust=cfg.trust, replace=replaced_from(cfg))
    data = require_text(data, f"export format={cfg.format}")
    latents = choose_latents(sae, cfg.latents, cfg.n_latents or sae.n_latents)
    sizes = {name: cfg[name] for name in ("n_tokens", "n_top", "n_random", "context", "n_logits", "n_neighbours")}
    names = Names(cfg.model, cfg.layer, cfg.source_set, cfg.release, cfg.creator)
    return export_dashboards(run_dir, sae, data, latents, cfg.format, out, names, sizes)


if __name__ == "__main__":
    main()
