"""Make one table and the figures of a sweep: `python -m sae_lab.report sweep_dir=multirun/...`."""

import logging

from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point, folder_from

log = logging.getLogger(__name__)


@entry_point("report")
def main(cfg: DictConfig) -> None:
    from sae_lab.runtime.files import write_atomically
    from sae_lab.sweeps.figures import draw_sweep, own_metrics_of
    from sae_lab.sweeps.headline import headline, markdown, show_headline
    from sae_lab.sweeps.status import all_jobs, job_statuses, show_statuses
    from sae_lab.sweeps.table import collect_table, complete_jobs, mark_unreadable, write_csv

    folder = folder_from(cfg, "sweep_dir")
    jobs = job_statuses(folder, all_jobs(folder))
    table = collect_table(folder)
    jobs = mark_unreadable(jobs, table)
    if any(job.status != "complete" or job.detail for job in jobs):
        show_statuses(jobs)
    if table.empty:
        return
    done = complete_jobs(table)
    if copies := (table["status"] == "complete").sum() - len(done):
        log.warning("%d jobs repeat others in every setting and the seed: counted once (report.csv has them).", copies)
    figures = draw_sweep(done, folder)
    cells = headline(table, done, own_metrics_of(folder, done))
    written = [folder / "report.csv", folder / "report.md", *figures]
    write_csv(table, written[0])
    write_atomically(written[1], markdown(cells, table, jobs, folder, figures).encode())
    show_headline(cells, written)


if __name__ == "__main__":
    main()
