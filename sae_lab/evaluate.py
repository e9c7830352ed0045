"""Evaluate an SAE, also by another rule or encoder: `python -m sae_lab.evaluate sae=outputs/...`."""

from collections.abc import Sequence
from typing import Annotated, TypedDict

from annotated_types import Ge, Gt
from omegaconf import DictConfig

from sae_lab.cli.entry import entry_point, folder_from, section_from
from sae_lab.cli.replaced import allow_new_keys, open_from
from sae_lab.runtime.checks import check_config


class Options(TypedDict):
    """The options of conf/evaluate.yaml."""

    sae_id: str | None
    sae_dir: str | None
    out: str | None
    activation: str | None
    k: Annotated[float, Gt(0)] | None
    n_eval_tokens: Annotated[int, Ge(1)] | None
    device: str
    trust: Sequence[str] | str
    encoder: str
    overwrite: bool


@entry_point("evaluate", allow_new_keys)
def main(cfg: DictConfig) -> None:
    """Evaluate an SAE on the data that it was trained on, or with other settings of data and language model.

    With `activation`, `k`, `encoder` or a setting that changes numbers, metrics.json and figures stay as they are, and
    metrics_<what differs>.json is written beside them. With `sae_dir`, everything is written into the folder of that
    SAE.
    """
    from sae_lab.evaluation.building import build_metrics
    from sae_lab.evaluation.evaluator import evaluate
    from sae_lab.evaluation.rules import compare_encoders, evaluate_under, set_k
    from sae_lab.runs.replacements import suffix_of
    from sae_lab.runs.results import write_comparison, write_metrics, write_results
    from sae_lab.runtime.errors import UserError
    from sae_lab.runtime.memory import keep_freed_memory
    from sae_lab.runtime.screen import print_files, print_metrics

    check_config(cfg, Options)
    pursuit_k = section_from(cfg, "pursuit").k
    if cfg.activation is not None and cfg.encoder != "own":
        raise UserError(f"activation={cfg.activation} and encoder={cfg.encoder} replace the same thing: give one.")
    keep_freed_memory()
    sae_dir = None if cfg.sae_dir is None else folder_from(cfg, "sae_dir")
    sae, data, folder, config, settings, _ = open_from(cfg, sae_dir=sae_dir, n_eval_tokens=cfg.n_eval_tokens)
    replaced, calibration_batches = {} if cfg.overwrite else settings, config.calibration_batches
    if cfg.k is not None:
        sae, replaced = set_k(sae, cfg.k, data, calibration_batches), {"k": cfg.k} | replaced
    suffix, said = suffix_of(replaced), {"settings": replaced} if replaced else {}
    if cfg.activation is not None:
        metrics = evaluate_under(cfg.activation, sae, data, calibration_batches)
        print_metrics(metrics, folder)
        print_files([write_metrics(metrics | said, sae, folder / f"metrics_{cfg.activation}{suffix}.json")])
    elif cfg.encoder != "own":
        metrics = compare_encoders(sae, cfg.encoder, pursuit_k, data)
        print_metrics(metrics["own"] | {"train_mode": metrics[cfg.encoder]}, folder, ("own", cfg.encoder))
        print_files([write_comparison(metrics | said, cfg.encoder, pursuit_k, folder, suffix)])
    else:
        evaluation = evaluate(sae, data, build_metrics(config))
        print_metrics(evaluation.metrics, folder)
        evaluation = evaluation._replace(metrics=evaluation.metrics | said)
        print_files(write_results(evaluation, sae, folder, suffix))


if __name__ == "__main__":
    main()
