"""Reads the files of a causal language model with `transformers`, or says why they are not one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_lab.lm.finding import unreadable
from sae_lab.runtime.errors import SettingError, UserError, first_line

OWN_KEYS = {
    **{"dtype": "dtype", "torch_dtype": "dtype", "device_map": "device_map", "revision": "revision"},
    **{"trust_remote_code": "trust_remote_code", "pretrained_model_name_or_path": "name"},
}
"""Arguments of `from_pretrained` that have a setting of their own."""
NOT_SETTINGS = ("config", "state_dict", "output_loading_info", "local_files_only", "weights_only")
VOCABULARIES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Files of which a folder with a tokenizer has at least one."""
GIVE_ANOTHER = "give {name}=<folder or hub name of a decoder-only language model>."


def loading_options(load: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings of `lm.load` as arguments of `from_pretrained`, with a config object for a quantisation.

    Raises:
        UserError: they are not a mapping, one of them has a setting of its own or cannot be set, or the quantisation is
            unknown.
    """
    if not isinstance(load, Mapping | None):
        raise SettingError(f"{{load}}={load} must be a mapping, such as '{{load}}={{{{attn_implementation: eager}}}}'.")
    options = dict(load or {})
    for name in options:
        if name in OWN_KEYS:
            raise SettingError(f"{{load}}.{name} has a setting of its own: give {{{OWN_KEYS[name]}}}=... instead.")
        if name in NOT_SETTINGS:
            raise SettingError(f"{{load}}.{name} cannot be set: leave it out.")
    quantisation = options.get("quantization_config")
    return options if quantisation is None else options | {"quantization_config": quantisation_of(quantisation)}


def quantisation_of(settings: Any) -> Any:
    """Return the config object of `transformers` for a quantisation, such as a BitsAndBytesConfig."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    key, example = "{load}.quantization_config", "{{load_in_8bit: true}} or {{quant_method: torchao, ...}}"
    if not isinstance(settings, Mapping):
        raise SettingError(f"{key} must be a dictionary, such as {example}.")
    try:
        return AutoQuantizationConfig.from_dict(dict(settings))
    except Exception as e:  # every method has its own exceptions
        reason = first_line(e).replace("{", "{{").replace("}", "}}")[:300]
        raise SettingError(f"{key} is not understood ({reason}): give a dictionary, such as {example}.") from e


def read_description(source: str, trust_remote_code: bool, **files: Any) -> dict[str, Any]:
    """Return config.json of a model.

    Raises:
        OSError: there is none.
        UserError: the model is not a causal language model, or needs code of its own that is not trusted.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    description, _ = PretrainedConfig.get_config_dict(source, **files)
    kind, architectures = description.get("model_type"), description.get("architectures") or []
    if "auto_map" in description and kind not in CONFIG_MAPPING:
        if not trust_remote_code:
            raise SettingError(
                f"{{name}}={source} comes with code of its own, which loading it would run: read that code, and give "
                "{trust_remote_code}=true if you trust it."
            )
        return description
    if not kind:
        raise SettingError(f"{{name}}={source} has a config.json without a model_type: {GIVE_ANOTHER}")
    if description.get("is_encoder_decoder") or (kind in CONFIG_MAPPING and is_encoder_decoder(kind)):
        raise SettingError(f"{{name}}={source} is an encoder-decoder model ({kind}): {GIVE_ANOTHER}")
    if not description.get("is_decoder") and any(name.endswith("ForMaskedLM") for name in architectures):
        raise SettingError(f"{{name}}={source} is a masked language model ({architectures[0]}): {GIVE_ANOTHER}")
    return description


def is_encoder_decoder(kind: str) -> bool:
    """Return whether models of a `model_type` are encoder-decoder models unless their config says otherwise."""
    from transformers import CONFIG_MAPPING

    return bool(getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False))


def read_model(
    source: str,
    dtype: torch.dtype,
    device_map: Any,
    options: Mapping[str, Any],
    trust_remote_code: bool,
    **files: Any,
) -> Any:
    """Return the model that `transformers` reads; of a multimodal checkpoint, the whole of it.

    Raises:
        OSError: a file is missing.
        UserError: the model is of another kind, its weights are incomplete, or a library cannot read a file.
    """
    trust = {"trust_remote_code": trust_remote_code}
    arguments = {"dtype": dtype, "device_map": device_map, "output_loading_info": True, **options, **trust, **files}
    try:
        auto = auto_class(source, **trust, **files)
        model, found = auto.from_pretrained(source, **arguments)
    except (OSError, UserError):
        raise
    except Exception as e:  # a broken file or an unsuitable config: every library below has its own exceptions
        raise unreadable(source, e) from e
    if missing := sorted(found["missing_keys"]):
        raise SettingError(
            f"{{name}}={source} is not a whole {type(model).__name__}: its files lack {len(missing)} weights, such as "
            f"{missing[0]}: {GIVE_ANOTHER}"
        )
    return model


def auto_class(source: str, **options: Any) -> Any:
    """Return the class of `transformers` that loads the model: of causal or, for some multimodal ones, of image models.

    Raises:
        UserError: neither class has a model of that kind.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(source, **options)
    if type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in (
        getattr(config, "auto_map", None) or {}
    ):
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    raise SettingError(
        f"{{name}}={source} cannot be loaded as a causal language model (`transformers` has none of model_type "
        f"{config.model_type}): {GIVE_ANOTHER}"
    )


def read_tokenizer(source: str, trust_remote_code: bool, **files: Any) -> Any:
    """Return the tokenizer.

    Raises:
        OSError: a file is missing.
        UserError: a library cannot read a file.
    """
    from transformers import AutoTokenizer

    missing = OSError(
        "its tokenizer is missing: save it too, with `tokenizer.save_pretrained(folder)`, or give "
        "lm.tokenizer=<folder or hub name>"
    )
    folder = Path(source)
    if folder.is_dir() and not any(found for pattern in VOCABULARIES for found in folder.glob(pattern)):
        raise missing
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **files)
    except OSError:
        raise
    except Exception as e:  # as in read_model
        raise unreadable(source, e) from e
    if tokenizer.vocab_size == 0:  # transformers returns an empty tokenizer if its files are missing
        raise missing
    return tokenizer
