"""Load the SAE, the data and the language model of a run folder."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from annotated_types import Ge
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from sae_lab.activations.building import build_data
from sae_lab.activations.digests import check_unchanged
from sae_lab.activations.stream import StreamData
from sae_lab.runs.checkpoint import origin_of
from sae_lab.runs.config import config_file, read_config
from sae_lab.runs.digests import CHECKPOINT, SAE, check_unaltered, warn_if_unchecked
from sae_lab.runs.folder import check_links
from sae_lab.runs.replacements import replace_settings, replaced_settings
from sae_lab.runs.trust import check_trusted
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.errors import UserError, report_typed_keys
from sae_lab.runtime.near_paths import no_such_path
from sae_lab.runtime.plain_text import plural
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import load_sae_folder


@check_arguments
def load_run(
    run_dir: str | Path,
    device: str = "auto",
    n_eval_tokens: Annotated[int, Ge(1)] | None = None,
    sae_dir: str | Path | None = None,
    trust: Sequence[str] | str = (),
    replace: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[BaseSAE, StreamData, DictConfig]:
    """Load a run: its SAE (on the language model's device), its data with the language model, and its config.

    Args:
        run_dir: the run folder.
        device: device of the language model and the SAE.
        n_eval_tokens: held-out tokens of an evaluation; None takes the run's own.
        sae_dir: an SAE folder to load instead of the run's own SAE.
        trust: modules outside this package whose classes the run's config may name (see runs/trust.py).
        replace: settings of the run's language model and data that differ now, by their full key, such as
            `{"data.lm_batch_rows": 8, "lm.name": "models/gpt2"}`. See runs/replacements.py.

    Raises:
        UserError: there is no run in `run_dir` or no SAE, one of its files is damaged or a link out of the folder, its
            config names code that is not trusted, `n_eval_tokens` is not a positive integer, or the language model or
            the text is not the one of the run and no setting of it is replaced.
    """
    folder = Path(run_dir)
    if not folder.exists():
        raise UserError(no_such_path(str(run_dir)))
    if not config_file(folder).is_file():
        raise UserError(f"{run_dir} is not a run folder (no .hydra/config.yaml): give run_dir=<folder of a run>.")
    for written in (folder, Path(sae_dir or folder)):
        check_links(written)
    own = read_config(folder)
    check_trusted(OmegaConf.to_container(own), config_file(folder), trust)
    check_parts(own, config_file(folder))
    warn_if_unchecked(folder)
    run = adapt_config(own, replace, device, n_eval_tokens)
    get_class(run.sae._target_)  # imports an SAE class from outside this package, which registers it
    with report_typed_keys(typed_device(replace)):
        data = build_data(run)
    if (folder / CHECKPOINT).is_file():
        check_origin(folder / CHECKPOINT, data, replaced_settings(own, run))
    if sae_dir is None:
        check_unaltered(Path(run_dir), SAE)
    sae = load_sae_folder(sae_dir or run_dir, data.device)
    check_width(sae, data)
    return sae, data, run


def adapt_config(own: DictConfig, replace: Mapping[str, Any], device: str, n_eval_tokens: int | None) -> DictConfig:
    """Return an SAE's config with settings replaced, the language model on a device, and so many held-out tokens.

    Raises:
        UserError: `device` and a replaced `lm.device` differ; see also replace_settings.
    """
    run, replaced = replace_settings(own, replace), replace.get("lm.device")
    if n_eval_tokens is not None:
        run.data.n_eval_tokens = n_eval_tokens
    if run.lm.get("devices") is not None:
        run.lm.devices = None  # those of the training
    if replaced in (None, "auto"):
        run.lm.device = device
    elif device not in ("auto", replaced):
        raise UserError(f"device={device} and lm.device={replaced} place the same model: give one of them.")
    return run


def typed_device(replace: Mapping[str, Any]) -> dict[str, str]:
    """Return the key by which the user gave the device that `adapt_config` puts in lm.device (see SettingError)."""
    return {} if replace.get("lm.device") not in (None, "auto") else {"lm.device": "device"}


def check_width(sae: BaseSAE, data: StreamData) -> None:
    """Raise a UserError unless the data have the width and the number of sites that the SAE takes."""
    if (data.n_sources, data.d_in) != (sae.n_sources, sae.d_in):
        raise UserError(
            f"the SAE takes activations of width {sae.d_in} at {plural(sae.n_sources, 'site')}, and {data.name} has "
            f"width {data.d_in} at the {data.n_sources} of lm.sites: correct the lm.* keys."
        )


def check_origin(checkpoint: Path, data: StreamData, replaced: Collection[str]) -> None:
    """Raise a UserError if model or text are not those of the run. What was replaced on purpose is not compared.

    Args:
        replaced: full keys of the settings that were.
    """
    digests = {"lm": ("the language model's weights", "the tokenizer"), "data": ("the text", "the activations")}
    free = [name for key in replaced for name in digests[key.partition(".")[0]]]
    began_with = origin_of(checkpoint, type(data).__name__)
    began_with = {name: digest for name, digest in began_with.items() if name not in free}
    check_unchanged(began_with, data.source_digests, "put back what it was trained with.")


def check_parts(run: DictConfig, source: Path, parts: Sequence[str] = ("lm", "data", "sae")) -> None:
    """Raise a UserError unless the config says how to build the language model, the data and the SAE."""
    for name in parts:
        node = OmegaConf.to_container(run).get(name)  # type: ignore[union-attr]
        if not (isinstance(node, dict) and isinstance(node.get("_target_"), str)) or {"_args_", "_partial_"} & {*node}:
            raise UserError(f"{source} is damaged ({name} does not say what to build): restore it, or train again.")
