"""Evaluate a run again, or its SAE by another rule or encoder: `python -m sae_lab.evaluate run_dir=outputs/...`."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

from annotated_types import Ge, Gt
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point, folder_from, section_from
from sae_lab.cli.replaced import allow_new_keys, replaced_from
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/evaluate.yaml."""

    sae_dir: str | None
    activation: str | None
    k: Annotated[float, Gt(0)] | None
    n_eval_tokens: Annotated[int, Ge(1)] | None
    device: str
    trust: Sequence[str] | str
    encoder: str
    overwrite: bool


@entry_point("evaluate", allow_new_keys)
def main(cfg: DictConfig) -> None:
    """Evaluate the SAE of a run on the run's own data, or with other settings of data and language model.

    With `activation`, `k`, `encoder` or a setting that changes numbers, the run's metrics.json and figures stay as they
    are, and metrics_<what differs>.json is written beside it. With `sae_dir`, everything is written into the folder of
    that SAE.
    """
    from sae_lab.evaluation.evaluator import evaluate
    from sae_lab.evaluation.rules import compare_encoders, evaluate_under, set_k
    from sae_lab.runs.config import read_config
    from sae_lab.runs.loading import load_run
    from sae_lab.runs.replacements import replaced_settings, suffix_of
    from sae_lab.runs.results import write_comparison, write_metrics, write_results
    from sae_lab.runtime.errors import UserError
    from sae_lab.runtime.memory import keep_freed_memory
    from sae_lab.runtime.screen import print_files, print_metrics
    from sae_lab.saes.files import sae_folder

    check_config(cfg, Options)
    pursuit_k = section_from(cfg, "pursuit").k
    run_dir = folder_from(cfg, "run_dir")
    folder = run_dir if cfg.sae_dir is None else sae_folder(folder_from(cfg, "sae_dir"))
    if cfg.activation is not None and cfg.encoder != "own":
        raise UserError(f"activation={cfg.activation} and encoder={cfg.encoder} replace the same thing: give one.")
    keep_freed_memory()
    sae, data, run = load_run(run_dir, cfg.device, cfg.n_eval_tokens, cfg.sae_dir, cfg.trust, replaced_from(cfg))
    replaced = {} if cfg.overwrite else replaced_settings(read_config(run_dir), run)
    if cfg.k is not None:
        sae, replaced = set_k(sae, cfg.k, data, run.calibration_batches), {"k": cfg.k} | replaced
    suffix, said = suffix_of(replaced), {"settings": replaced} if replaced else {}
    if cfg.activation is not None:
        metrics = evaluate_under(cfg.activation, sae, data, run.calibration_batches)
        print_metrics(metrics, folder)
        print_files([write_metrics(metrics | said, sae, folder / f"metrics_{cfg.activation}{suffix}.json")])
    elif cfg.encoder != "own":
        metrics = compare_encoders(sae, cfg.encoder, pursuit_k, data)
        print_metrics(metrics["own"] | {"train_mode": metrics[cfg.encoder]}, folder, ("own", cfg.encoder))
        print_files([write_comparison(metrics | said, cfg.encoder, pursuit_k, folder, suffix)])
    else:
        evaluation = evaluate(sae, data)
        print_metrics(evaluation.metrics, folder)
        evaluation = evaluation._replace(metrics=evaluation.metrics | said)
        print_files(write_results(evaluation, sae, folder, suffix))


if __name__ == "__main__":
    main()
