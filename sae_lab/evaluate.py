"""Evaluate a run again, or its SAE by another rule or encoder: `python -m sae_lab.evaluate run_dir=outputs/...`."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

from annotated_types import Ge
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point, folder_from, section_from
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/evaluate.yaml."""

    sae_dir: str | None
    activation: str | None
    n_eval_tokens: Annotated[int, Ge(1)] | None
    device: str
    trust: Sequence[str] | str
    encoder: str


@entry_point("evaluate")
def main(cfg: DictConfig) -> None:
    """Evaluate the SAE of a run on the run's own data; `n_eval_tokens` and `device` may differ.

    With `activation` or `encoder`, the run's metrics.json stays as it is and metrics_<which>.json is written beside it.
    With `sae_dir`, everything is written into the folder of that SAE.
    """
    from sae_lab.evaluation.evaluator import evaluate
    from sae_lab.evaluation.rules import compare_encoders, evaluate_under
    from sae_lab.runs.loading import load_run
    from sae_lab.runs.results import write_comparison, write_metrics, write_results
    from sae_lab.runtime.errors import UserError
    from sae_lab.runtime.memory import keep_freed_memory
    from sae_lab.runtime.screen import print_files, print_metrics
    from sae_lab.saes.files import sae_folder

    check_config(cfg, Options)
    k = section_from(cfg, "pursuit").k
    run_dir = folder_from(cfg, "run_dir")
    folder = run_dir if cfg.sae_dir is None else sae_folder(folder_from(cfg, "sae_dir"))
    if cfg.activation is not None and cfg.encoder != "own":
        raise UserError(f"activation={cfg.activation} and encoder={cfg.encoder} replace the same thing: give one.")
    keep_freed_memory()
    sae, data, run = load_run(run_dir, cfg.device, cfg.n_eval_tokens, cfg.sae_dir, cfg.trust)
    if cfg.activation is not None:
        metrics = evaluate_under(cfg.activation, sae, data, run.calibration_batches)
        print_metrics(metrics, folder)
        print_files([write_metrics(metrics, sae, folder / f"metrics_{cfg.activation}.json")])
    elif cfg.encoder != "own":
        metrics = compare_encoders(sae, cfg.encoder, k, data)
        print_metrics(metrics["own"] | {"train_mode": metrics[cfg.encoder]}, folder, ("own", cfg.encoder))
        print_files([write_comparison(metrics, cfg.encoder, k, folder)])
    else:
        evaluation = evaluate(sae, data)
        print_metrics(evaluation.metrics, folder)
        print_files(write_results(evaluation, sae, folder))


if __name__ == "__main__":
    main()
