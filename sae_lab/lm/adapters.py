"""Adapters of PEFT, such as LoRA: small weights beside a base model, merged into it when they are loaded."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sae_lab.lm.finding import unreadable
from sae_lab.runtime.errors import SettingError
from sae_lab.runtime.files import read_small

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def find_adapter(source: str, **files: Any) -> Path | None:
    """Return the local folder of an adapter's files, which are downloaded if need be; None for a whole model.

    Raises:
        OSError: it is neither, or has no weights.
    """
    from transformers.utils import cached_file

    def find(name: str) -> str | None:
        missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        return cached_file(source, name, **missing, **files)

    config = find(CONFIG)
    if config is None and find("config.json") is None:
        raise OSError(f"it has neither config.json nor {CONFIG}")
    if config is None:
        return None
    if not any(find(name) for name in WEIGHTS):
        raise OSError(f"it has {CONFIG}, but none of {' and '.join(WEIGHTS)}")
    return Path(config).parent


def base_of(folder: Path, name: str) -> str:
    """Return the name of the base model in adapter_config.json.

    Raises:
        UserError: it cannot be read or names none, or PEFT is not installed.
    """
    if find_spec("peft") is None:
        raise SettingError(f"{{name}}={name} is an adapter of PEFT, which is missing: pip install 'sae-lab[peft]'.")
    try:
        base = json.loads(read_small(folder / CONFIG, limit=2**20)).get("base_model_name_or_path")
    except (ValueError, AttributeError) as e:
        raise unreadable(name, e) from e
    if not base:
        raise SettingError(f"{{name}}={name} is an adapter that names no base model: give {{base_model}}=...")
    return str(base)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a tokenizer was saved with the adapter."""
    return (folder / "tokenizer_config.json").is_file()


def merge_adapter(model: Any, folder: Path, name: str) -> Any:
    """Return the base model with the adapter's weights added to its own.

    Raises:
        UserError: the adapter does not fit the model, has weights that are not finite, or is of a kind that is not
            added to weights, such as prompt tuning.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # such weights would stay at zero
            adapted = PeftModel.from_pretrained(model, str(folder))
            if not hasattr(adapted.base_model, "merge_and_unload"):
                kind = getattr(adapted.active_peft_config.peft_type, "value", "this kind")
                raise TypeError(f"an adapter of {kind} is not merged into weights: give one of LORA")
            return adapted.merge_and_unload(safe_merge=True)
    except Exception as e:  # PEFT raises what torch and safetensors raise
        raise unreadable(name, e) from e
