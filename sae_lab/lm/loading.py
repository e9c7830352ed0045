"""A causal language model and its tokenizer: found, read, put on a device; every failure told in one sentence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.device import resolve_device
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.hub import HUB_TIMEOUT, hub_errors

TINY = "tiny"
SIBLING = "outputs/tiny_disassembly"  # where fine_tune_tiny.py writes, unless told otherwise
DeviceMap = str | dict[str, int | str] | None


class LoadedLM(LanguageModel):
    """A language model that `transformers` loads; a back end says what is made of it.

    Args:
        name: hub name, local folder, or "tiny" for the bundled model.
        sites: site names, in the order of axis s.
        dtype: dtype of weights, activations and logits.
        device: "auto" is CUDA where there is one.
        device_map: for a model larger than one device, "auto" or accelerate's map from modules to devices. The
            activations of all sites then come to the device of the embedding.
        bos_id: opens a row and parts documents; None takes the tokenizer's BOS, else its EOS.
        revision: branch, tag or commit of the hub's repository.

    Raises:
        UserError: whatever `load` and LanguageModel raise.
    """

    def __init__(
        self,
        name: str,
        sites: Sequence[str] | str,
        dtype: str = "float32",
        device: str = "auto",
        device_map: DeviceMap = None,
        bos_id: int | None = None,
        revision: str | None = None,
    ):
        model, tokenizer = load(name, dtype, revision, device, device_map)
        super().__init__(name, sites, self.adopt(name, model, tokenizer), model.config, tokenizer, bos_id)

    def adopt(self, name: str, model: Any, tokenizer: Any) -> Any:
        """What runs, made of what was loaded."""
        return model


def load(
    name: str, dtype: str, revision: str | None, device: str = "cpu", device_map: DeviceMap = None
) -> tuple[Any, Any]:
    """Model and tokenizer: from a local folder, else the Hugging Face cache, else the hub.

    What is in the cache is used without asking the hub: `transformers` would ask for every optional file and, with no
    network, retry each for 23 seconds.

    Raises:
        UserError: no name, no such folder or model, hub out of reach, no causal language model, no tokenizer, unknown
            dtype, no such device.
    """
    if not isinstance(name, str):
        raise UserError(f"lm.name={'null' if name is None else name} must be a hub name or the path of a folder.")
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise UserError(f"lm.dtype={dtype} is no floating-point dtype of torch: use float32, bfloat16 or float16.")
    if device_map is not None and device != "auto":
        raise UserError(f"lm.device={device} and lm.device_map={device_map} exclude each other: give one of them.")
    options = {"dtype": torch_dtype, "device_map": device_map, "revision": revision or "main"}
    model, tokenizer = _find(name, revision, options)
    return (place_model(model, device) if device_map is None else model), tokenizer


def place_model(model: Any, device: str) -> Any:
    """The model moved to the device; "auto" is CUDA where there is one, else the CPU."""
    device = resolve_device(device)
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as e:  # torch's two ways to say that there is no such device
        reason = str(e).splitlines()[0]
        raise UserError(f"lm.device={device} cannot hold the model ({reason}): use lm.device=auto or cpu.") from e


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
        if tokenizer.vocab_size == 0:  # what transformers makes of a folder without tokenizer files
            raise OSError("its tokenizer is missing: save it too, with `tokenizer.save_pretrained(folder)`")
        return AutoModelForCausalLM.from_pretrained(source, **weights, **files), tokenizer
    except OSError:
        raise
    except Exception as e:  # a broken file or a config of another kind: every library below has its own exception
        raise _unreadable(source, e) from e


def _unreadable(name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return UserError(f"lm.name={name} cannot be loaded as a causal language model with its tokenizer: {reason}")


def find_folder(name: str) -> Path | None:
    """The folder that `name` means, or None where it can only be a hub name."""
    folder = Path(__file__).parent / "tiny" if name == TINY else Path(name).expanduser()
    fix = "give a folder written by `save_pretrained`, a hub name, or lm=tiny."
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"lm.name={name} is a folder without config.json: {fix}")
        return folder
    if name == SIBLING:
        raise UserError(f"lm.name={name} is not there yet: make it with `python -m sae_lab.lm.tiny.fine_tune`.")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise UserError(f"lm.name={name} is no folder: {fix}")
    return None


def check_hub(name: str, revision: str | None) -> None:
    """Ask the hub for the model once, without retries; UserError if it does not answer or does not have it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    unreachable = (
        f"{name} is neither a local folder nor in the Hugging Face cache, and the hub cannot be reached "
        f"({{reason}}): use lm=tiny, give lm.name=<local folder>, or download it first with `hf download {name}`."
    )
    with hub_errors(unreachable):
        try:
            HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        except RevisionNotFoundError as e:
            raise UserError(f"the hub's {name} has no revision {revision}: correct lm.revision=...") from e
        except RepositoryNotFoundError as e:
            raise UserError(
                f"{name} is neither a local folder nor a model of the hub that you may see: "
                "correct lm.name=..., or log in with `hf auth login` if it is private."
            ) from e


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of `transformers` inside, as before outside."""
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
