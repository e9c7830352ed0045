"""Match the latents of SAEs by the cosines of their decoder rows: `python -m sae_lab.compare 'sae=[a,b]'`."""

from pathlib import Path
from typing import TypedDict

from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point
from sae_lab.cli.replaced import allow_new_keys, sources_from
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/compare.yaml."""

    out: str | None
    overwrite: bool


@entry_point("compare", allow_new_keys)
def main(cfg: DictConfig) -> None:
    from sae_lab.evaluation.matching import agreement, compare_all
    from sae_lab.interop.load import load_sae
    from sae_lab.runs.pages import check_comparison, write_comparison_page
    from sae_lab.runs.result_folders import comparison_folder, prepare_folder
    from sae_lab.runtime.screen import print_files, print_table

    check_config(cfg, Options)
    sources = sources_from(cfg)
    folder = Path(cfg.out) if cfg.out else comparison_folder(sources)
    if not cfg.overwrite:
        check_comparison(folder, sources)
    saes = {name: load_sae(source, sae_id=sae_id) for name, (source, sae_id) in sources.items()}
    comparisons = compare_all(saes)
    print_table("means over all pairs", ("measure", "value"), [[*row] for row in agreement(comparisons).items()])
    facts = ", ".join(f"{name}: {type(sae).__name__}, {sae.n_latents:,} latents" for name, sae in saes.items())
    print_files(write_comparison_page(comparisons, prepare_folder(folder), sources, facts))


if __name__ == "__main__":
    main()
