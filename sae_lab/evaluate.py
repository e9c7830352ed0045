"""A run -> its metrics, tables and figures: `python -m sae_lab.evaluate run_dir=outputs/...`."""

from pathlib import Path

from omegaconf import DictConfig

from sae_lab.activations.data import ActivationData
from sae_lab.cli.entry import entry_point, folder_from
from sae_lab.evaluation.evaluator import evaluate, evaluate_all
from sae_lab.evaluation.rules import evaluate_under
from sae_lab.ops.pursuit import METHODS
from sae_lab.runs.loading import load_run
from sae_lab.runs.results import write_metrics, write_results
from sae_lab.runtime.errors import UserError, settings_under
from sae_lab.runtime.files import write_json
from sae_lab.runtime.memory import keep_freed_memory
from sae_lab.runtime.screen import print_files, print_metrics
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import sae_folder
from sae_lab.saes.pursuit_sae import PursuitSAE


def compare(sae: BaseSAE, encoder: str, k: int | None, data: ActivationData, folder: Path) -> Path:
    """The SAE's own encoder and a pursuit of its dictionary, side by side in a file of their own, with rows/s."""
    if encoder not in METHODS:
        raise UserError(f"encoder={encoder} is not known: choose own or one of {', '.join(METHODS)}.")
    with settings_under("pursuit"):
        pursuit = PursuitSAE.of(sae, encoder, k)
    evaluations = evaluate_all({"own": sae, encoder: pursuit}, data)
    metrics = {name: {"rows_per_second": e.rows_per_second} | e.metrics for name, e in evaluations.items()}
    metrics[encoder]["k"] = pursuit.k
    print_metrics(metrics["own"] | {"train_mode": metrics[encoder]}, folder, ("own", encoder))
    file = folder / f"metrics_{encoder}{'' if k is None else f'_k{k}'}.json"
    write_json(file, metrics)
    return file


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Repeat the evaluation of a run on its own data; `n_eval_tokens` and `device` may differ.

    With another `activation` or `encoder` than the SAE's own, the run's files stay as they are: metrics_<which>.json is
    added. With `sae_dir` they do in any case: what is written lies in that SAE's folder.
    """
    run_dir = folder_from(cfg, "run_dir")
    folder = run_dir if cfg.sae_dir is None else sae_folder(folder_from(cfg, "sae_dir"))
    if cfg.activation is not None and cfg.encoder != "own":
        raise UserError(f"activation={cfg.activation} and encoder={cfg.encoder} replace the same thing: give one.")
    keep_freed_memory()
    sae, data, run = load_run(run_dir, cfg.device, cfg.n_eval_tokens, cfg.sae_dir)
    if cfg.activation is not None:
        metrics = evaluate_under(cfg.activation, sae, data, run.calibration_batches)
        print_metrics(metrics, folder)
        print_files([write_metrics(metrics, sae, folder / f"metrics_{cfg.activation}.json")])
        return
    if cfg.encoder != "own":
        print_files([compare(sae, cfg.encoder, cfg.pursuit.k, data, folder)])
        return
    evaluation = evaluate(sae, data)
    print_metrics(evaluation.metrics, folder)
    print_files(write_results(evaluation, sae, folder))


if __name__ == "__main__":
    main()
