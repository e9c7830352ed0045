"""A sweep → one table and the figures: `python -m sae_lab.report sweep_dir=multirun/...`."""

import logging

from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point, folder_of
from sae_lab.sweeps.figures import draw
from sae_lab.sweeps.headline import headline, markdown, show
from sae_lab.sweeps.standing import all_jobs, standings
from sae_lab.sweeps.standing import show as show_standings
from sae_lab.sweeps.table import begun, collect, complete

log = logging.getLogger(__name__)


@entry_point("report")
def main(cfg: DictConfig) -> None:
    folder = folder_of(cfg, "sweep_dir")
    jobs = standings(folder, all_jobs(folder))
    if {job.status for job in jobs} != {"complete"}:
        show_standings(jobs)
    if not begun(folder):
        return
    table = collect(folder)
    done = complete(table)
    if copies := (table["status"] == "complete").sum() - len(done):
        log.warning("%d jobs repeat others in every setting and the seed: counted once (report.csv has them).", copies)
    figures = draw(done, folder)
    cells = headline(table, done)
    written = [folder / "report.csv", folder / "report.md", *figures]
    table.to_csv(written[0], index=False)
    written[1].write_text(markdown(cells, table, jobs, folder, figures), encoding="utf-8")
    show(cells, written)


if __name__ == "__main__":
    main()
