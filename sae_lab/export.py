"""Write a run's SAE in another library's files, with a model card: `python -m sae_lab.export run_dir=...`."""

from pathlib import Path
from typing import TypedDict

from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point, folder_from
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/export.yaml."""

    format: str
    out: str | None
    push_to_hub: str | None
    private: bool


@entry_point("export")
def main(cfg: DictConfig) -> None:
    from sae_lab.runs.export import describe_upload, export_run, push_to_hub
    from sae_lab.runtime.plain_text import for_terminal
    from sae_lab.runtime.screen import print_files

    check_config(cfg, Options)
    run_dir = folder_from(cfg, "run_dir")
    out = Path(cfg.out or run_dir / "export" / str(cfg.format))
    files = export_run(run_dir, cfg.format, out)
    print_files(files)
    if cfg.push_to_hub:
        print(for_terminal(describe_upload(out, files, cfg.push_to_hub, cfg.private)), flush=True)
        print(push_to_hub(out, files, cfg.push_to_hub, cfg.private))


if __name__ == "__main__":
    main()
