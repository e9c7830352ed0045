"""Load a causal language model and its tokenizer with `transformers`; every failure is a one-sentence UserError."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch

from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.device import resolve_device
from sae_lab.runtime.errors import SettingError
from sae_lab.runtime.hub import HUB_TIMEOUT, hub_errors

TINY = "tiny"
FINE_TUNED_TINY = "outputs/tiny_disassembly"  # default output folder of `python -m sae_lab.lm.tiny.fine_tune`
ModelName = Annotated[str, ErrorMessage("must be a hub name or the path of a folder")]
DeviceMap = str | dict[str, int | str] | None


class LoadedLM(LanguageModel):
    """A language model that `transformers` loads. A back end may wrap it by overriding `wrap`.

    Args:
        name: hub name, local folder, or "tiny" for the bundled model.
        sites: site names, in the order of axis s.
        dtype: dtype of weights, activations and logits.
        device: "auto" is CUDA if available, else the CPU.
        device_map: for a model larger than one device: "auto", or accelerate's map from modules to devices. The
            activations of all sites are then moved to the device of the embedding.
        bos_id: token id that begins each row and separates documents; None takes the tokenizer's BOS, else its EOS.
        revision: branch, tag or commit of the repository on the hub.

    Raises:
        UserError: the errors of `load` and LanguageModel.
    """

    @check_arguments
    def __init__(
        self,
        name: ModelName,
        sites: Sequence[str] | str | None,
        dtype: str = "float32",
        device: str = "auto",
        device_map: DeviceMap = None,
        bos_id: int | None = None,
        revision: str | None = None,
    ):
        model, tokenizer = load(name, dtype, revision, device, device_map)
        super().__init__(name, sites, self.wrap(name, model, tokenizer), model.config, tokenizer, bos_id)

    def wrap(self, name: str, model: Any, tokenizer: Any) -> Any:
        """Return the module that runs: the loaded model, or a back end's wrapper around it."""
        return model


def load(
    name: str, dtype: str, revision: str | None, device: str = "cpu", device_map: DeviceMap = None
) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a local folder, else the Hugging Face cache, else the hub.

    A model in the cache is used without asking the hub: `transformers` would ask for every optional file and, without
    a network, retry each for 23 seconds.

    Raises:
        UserError: there is no such folder, model, dtype or device; the hub cannot be reached; or the files hold no
            causal language model with a tokenizer.
    """
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise SettingError(f"{{dtype}}={dtype} is not a floating-point dtype: use float32, bfloat16 or float16.")
    if device_map is not None and device != "auto":
        raise SettingError(
            f"{{device}}={device} and {{device_map}}={device_map} exclude each other: set only one of them."
        )
    options = {"dtype": torch_dtype, "device_map": device_map, "revision": revision or "main"}
    model, tokenizer = _find(name, revision, options)
    return (place_model(model, device) if device_map is None else model), tokenizer


def place_model(model: Any, device: str) -> Any:
    """Move the model to a device; "auto" is CUDA if available, else the CPU."""
    device = resolve_device(device)
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as e:  # torch raises either if there is no such device
        reason = str(e).splitlines()[0]
        raise SettingError(f"{{device}}={device} cannot hold the model ({reason}): use {{device}}=auto or cpu.") from e


def _find(name: str, revision: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    folder = find_folder(name)
    try:
        with quiet():
            return _read(str(folder or name), options | {"local_files_only": True})
    except OSError as e:  # a file is missing
        if folder is not None:
            raise _unreadable(name, e) from e
    check_hub(name, revision)
    try:
        return _read(name, options)
    except OSError as e:
        raise _unreadable(name, e) from e


def _read(source: str, options: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = {key: options[key] for key in ("dtype", "device_map")}
    files = {key: value for key, value in options.items() if key not in weights} | {"trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **files)
        if tokenizer.vocab_size == 0:  # transformers returns an empty tokenizer if its files are missing
            raise OSError("its tokenizer is missing: save it too, with `tokenizer.save_pretrained(folder)`")
        return AutoModelForCausalLM.from_pretrained(source, **weights, **files), tokenizer
    except OSError:
        raise
    except Exception as e:  # a broken file or an unsuitable config: every library below has its own exceptions
        raise _unreadable(source, e) from e


def _unreadable(name: str, error: Exception) -> SettingError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return SettingError(f"{{name}}={name} cannot be loaded as a causal language model with its tokenizer: {reason}")


def find_folder(name: str) -> Path | None:
    """Return the folder that `name` refers to, or None if it can only be a hub name."""
    folder = Path(__file__).parent / "tiny" if name == TINY else Path(name).expanduser()
    fix = "give a folder written by `save_pretrained` or a hub name, or use lm=tiny."
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SettingError(f"{{name}}={name} is a folder without config.json: {fix}")
        return folder
    if name == FINE_TUNED_TINY:
        raise SettingError(f"{{name}}={name} does not exist yet: make it with `python -m sae_lab.lm.tiny.fine_tune`.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise SettingError(f"{{name}}={name} is not a folder: {fix}")
    return None


def check_hub(name: str, revision: str | None) -> None:
    """Ask the hub for the model once, without retries.

    Raises:
        UserError: the hub cannot be reached, or has no such model or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    unreachable = (
        f"lm.name={name} is neither a local folder nor in the Hugging Face cache, and the hub cannot be reached "
        f"({{reason}}): use lm=tiny, set lm.name=<local folder>, or download it first with `hf download {name}`."
    )
    with hub_errors(unreachable):
        try:
            HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        except RevisionNotFoundError as e:
            raise SettingError(
                f"{{revision}}={revision} is not a branch, tag or commit of {name} on the hub: correct {{revision}}."
            ) from e
        except RepositoryNotFoundError as e:
            raise SettingError(
                f"{{name}}={name} is neither a local folder nor a model on the hub that you have access to: "
                "correct {name}, or log in with `hf auth login` if the model is private."
            ) from e


@contextmanager
def quiet() -> Iterator[None]:
    """Disable the progress bars and warnings of `transformers` inside the context, and restore them afterwards."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
