"""Open any SAE for a command: with its data and language model, and the folder where results go."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from sae_lab.activations.building import build_data
from sae_lab.activations.stream import StreamData
from sae_lab.interop.load import load_sae
from sae_lab.interop.trained_on import trained_on
from sae_lab.lm.sites import UnknownSite
from sae_lab.runs.config import bring_up_to_date, read_config
from sae_lab.runs.folder import MAY_CHANGE
from sae_lab.runs.loading import adapt_config, check_parts, check_width, load_run, typed_device
from sae_lab.runs.replacements import SECTIONS, is_choice, replaced_settings
from sae_lab.runs.result_folders import is_run, name_of, prepare_folder, results_folder
from sae_lab.runs.trust import check_trusted
from sae_lab.runtime.errors import UserError, report_typed_keys
from sae_lab.runtime.files import read_json
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import CONFIG, sae_folder

log = logging.getLogger(__name__)

NOTHING: Mapping[str, Any] = MappingProxyType({})


class OpenedSAE(NamedTuple):
    """An SAE with all that a command needs of it.

    Attributes:
        sae: in eval mode, on the language model's device.
        data: with the language model, as training has them.
        folder: where results go; it exists.
        config: what the data were built from, and `calibration_batches`.
        settings: those that differ from the SAE's own and change numbers, by their full key: they name the results.
        name: what a page calls the SAE.
    """

    sae: BaseSAE
    data: StreamData
    folder: Path
    config: DictConfig
    settings: dict[str, Any]
    name: str


def open_sae(
    source: str | Path,
    device: str = "auto",
    *,
    sae_id: str | None = None,
    sae_dir: str | Path | None = None,
    n_eval_tokens: int | None = None,
    trust: Sequence[str] | str = (),
    replace: Mapping[str, Any] = NOTHING,
    typed: Mapping[str, Any] = NOTHING,
    options: Mapping[str, Any] = NOTHING,
    out: str | Path | None = None,
) -> OpenedSAE:
    """Open an SAE: a run folder, or anything that `load_sae` reads.

    A run fills in its language model and data, an SAE folder of ours what its provenance says of them. Any other SAE
    needs both in `replace`; its sites are those that its files or its release name, or `typed`'s lm.sites.

    Args:
        source, device, sae_id, trust: as for `load_sae` and `load_run`.
        sae_dir: of a run, an SAE folder to open instead of the run's own SAE.
        n_eval_tokens: held-out tokens of an evaluation; None: as the data have it.
        replace: settings of language model and data that differ from the SAE's own, by their full key. With
            `lm._target_` or `data._target_`, all settings of that part.
        typed: the same as the user typed it: the name of results for an SAE that has no settings of its own.
        options: training's defaults of options, such as calibration_batches, for an SAE that is no run.
        out: folder of the results; None: see home_of.

    Raises:
        UserError: there is no such SAE; language model or data are missing, not trusted or do not fit it; its sites
            are unknown, or the language model lacks them, and they are not typed.
    """
    if is_run(source, sae_id):
        sae, data, run = load_run(source, device, n_eval_tokens, sae_dir, trust, replace)
        folder = prepare_folder(Path(out or (source if sae_dir is None else sae_folder(sae_dir))))
        return OpenedSAE(sae, data, folder, run, replaced_settings(read_config(Path(source)), run), Path(source).name)
    if sae_dir is not None:
        raise UserError(f"sae_dir={sae_dir} is an SAE of a run, and {source} is no run folder: give sae={sae_dir}.")
    sae = load_sae(source, sae_id=sae_id)
    said = config_of_sae(source, sae_id, trust)
    own = OmegaConf.create({"lm": {}, "data": {}, **options, **said})
    config = adapt_config(own, replace, device, n_eval_tokens)
    check_named(config, source)
    has_sites = "sites" not in config.lm or "lm.sites" in typed or (said and "lm._target_" not in replace)
    with report_typed_keys(typed_device(replace)):
        data = build_data(config) if has_sites else build_where_trained(config, sae, source, sae_id)
    check_width(sae, data)
    settings = replaced_settings(own, config) if said else settings_of_numbers(typed, n_eval_tokens)
    folder = prepare_folder(Path(out or results_folder(source, sae_id)))
    return OpenedSAE(sae.to(data.device), data, folder, config, settings, name_of(source, sae_id))


def build_where_trained(config: DictConfig, sae: BaseSAE, source: str | Path, sae_id: str | None) -> StreamData:
    """Build the data, with the language model read where the SAE was trained. Writes these sites into the config.

    Raises:
        UserError: that is unknown, or the language model lacks these sites.
    """
    known = trained_on(source, sae_id, sae.n_inputs, sae.n_sources)
    name, of_model = config.lm.get("name"), f" of {known.model}" if known.model else ""
    for sites in known.sites:
        config.lm.sites = sites
        try:
            data = build_data(config)
        except UnknownSite:
            continue
        log.info("%s was trained on %s%s: reading %s there.", source, ", ".join(sites), of_model, name)
        return data
    if not known.sites:
        raise UserError(f"{source} does not say on which sites it was trained: type lm.sites=[...].")
    there = ", ".join(known.sites[0])
    raise UserError(f"{source} was trained on {there}{of_model}, which {name} does not have: type lm.sites=[...].")


def config_of_sae(source: str | Path, sae_id: str | None, trust: Sequence[str] | str) -> dict[str, Any]:
    """Return the language model and the data in the provenance of an SAE folder of ours; empty for any other SAE.

    Raises:
        UserError: they name code that is not trusted.
    """
    file = Path(source).expanduser() / (sae_id or "") / CONFIG
    provenance = read_json(file).get("provenance") if file.is_file() else None
    if not isinstance(provenance, dict) or not all(is_choice(provenance.get(name)) for name in SECTIONS):
        return {}
    said = {name: bring_up_to_date(provenance[name]) for name in SECTIONS}
    check_trusted(OmegaConf.to_container(OmegaConf.create(said)), Path(source) / CONFIG, trust)
    return said


def check_named(config: DictConfig, source: str | Path) -> None:
    """Raise a UserError that says what to type if the language model or the data are missing or damaged."""
    examples = {"lm": "lm=gpt2 lm.sites=[blocks.8.hook_resid_pre]", "data": "data=text_files data.paths=[corpus]"}
    if missing := [name for name in SECTIONS if "_target_" not in config[name]]:
        what = {"lm": "language model", "data": "data"}
        raise UserError(
            f"{source} does not say its {' and its '.join(what[name] for name in missing)}: "
            f"give {' and '.join(f'{name}=...' for name in missing)} as for training, such as "
            f"{' '.join(examples[name] for name in missing)}."
        )
    check_parts(config, Path(source), SECTIONS)


def settings_of_numbers(typed: Mapping[str, Any], n_eval_tokens: int | None) -> dict[str, Any]:
    """Return the typed settings that change numbers."""
    counted = {} if n_eval_tokens is None else {"data.n_eval_tokens": n_eval_tokens}
    return {key: value for key, value in typed.items() if key not in MAY_CHANGE} | counted
