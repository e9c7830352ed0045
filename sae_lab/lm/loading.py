"""Load a causal language model and its tokenizer with `transformers`; every failure is a one-sentence UserError."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from omegaconf import Container, OmegaConf
from torch import nn
from typing_extensions import Self

from sae_lab.lm.adapters import base_of, find_adapter, has_tokenizer, merge_adapter
from sae_lab.lm.base import LanguageModel
from sae_lab.lm.devices import Devices, device_names, devices_of_rank
from sae_lab.lm.finding import TOKENIZER_FILES, read_local_first
from sae_lab.lm.weights import loading_options, read_description, read_model, read_tokenizer
from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.checks import check_arguments
from sae_lab.runtime.device import resolve_device
from sae_lab.runtime.errors import SettingError

ModelName = Annotated[str, ErrorMessage("must be a hub name or the path of a folder")]
DeviceMap = str | dict[str, int | str] | None


class LoadedLM(LanguageModel):
    """A language model that `transformers` loads. A back end may wrap it by overriding `wrap`.

    Args:
        name: hub name, local folder, or "tiny" for the bundled model; also of an adapter of PEFT.
        sites: site names, in the order of axis s.
        dtype: dtype of weights, activations and logits.
        device: "auto" is CUDA if available, else the CPU.
        device_map: for a model larger than one device: "auto", or accelerate's map from modules to devices. The
            activations of all sites are then moved to the device of the embedding.
        bos_id: token id that begins each row and separates documents; None takes the tokenizer's BOS, else its EOS.
        revision: branch, tag or commit of the repository on the hub.
        tokenizer: hub name or local folder of the tokenizer; None takes the model's own.
        base_model: for an adapter: its base model; None takes the one that the adapter's config names.
        trust_remote_code: run the code that comes with the model, if there is any.
        devices: devices on which copies of the model compute the activations of training, as numbers of GPUs or names;
            with n ranks, rank r has every n-th from the r-th on. The model itself is on the first.
        load: other arguments of `from_pretrained`, such as {"attn_implementation": "eager"} or
            {"quantization_config": {"load_in_8bit": True}}.

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
        tokenizer: str | None = None,
        base_model: str | None = None,
        trust_remote_code: bool = False,
        load: Mapping[str, Any] | None = None,
        devices: Devices = None,
    ):
        if devices is not None:
            self.devices, device = place_copies(devices, device, device_map)
        model, found = load_model(
            name,
            dtype,
            revision,
            device,
            device_map,
            load,
            tokenizer=tokenizer,
            base_model=base_model,
            trust_remote_code=trust_remote_code,
        )
        self._set_up(name, sites, model, found, bos_id)

    @classmethod
    def from_modules(
        cls,
        model: nn.Module,
        tokenizer: Any,
        sites: Sequence[str] | str | None,
        name: str | None = None,
        bos_id: int | None = None,
    ) -> Self:
        """Return a language model of an `nn.Module` and a tokenizer that exist already, on the module's device.

        The module is set to eval mode and its parameters no longer require a gradient. It takes token ids `(n, t)` and
        returns logits `(n, t, v)`, or an object with `logits`.

        Raises:
            UserError: the errors of LanguageModel.
        """
        lm = cls.__new__(cls)
        lm._set_up(name or type(model).__name__, sites, model, tokenizer, bos_id)
        return lm

    def _set_up(
        self, name: str, sites: Sequence[str] | str | None, model: Any, tokenizer: Any, bos_id: int | None
    ) -> None:
        """Wrap the model and set the attributes of LanguageModel."""
        config, n_ids = getattr(model, "config", None), count_embeddings(model)
        super().__init__(name, sites, self.wrap(name, model, tokenizer), config, tokenizer, bos_id, n_ids)

    def wrap(self, name: str, model: Any, tokenizer: Any) -> Any:
        """Return the module that runs: the loaded model, or a back end's wrapper around it."""
        return model

    @property
    def body(self) -> nn.Module | None:
        return decoder_of(self.model)


def place_copies(
    devices: Sequence[int | str], device: str | None, device_map: Any = None
) -> tuple[tuple[str, ...], str]:
    """Return the names of `devices`, and that of the first one of this rank.

    Raises:
        SettingError: there is no such device, or the model is placed by another setting as well.
    """
    for key, value in {"device": device, "device_map": device_map}.items():
        if value not in (None, "auto") or (key == "device_map" and value is not None):
            raise SettingError(f"{{{key}}}={value} and {{devices}}={[*devices]} both place the model: set one of them.")
    names = device_names(devices)
    return names, devices_of_rank(names)[0]


def decoder_of(model: Any) -> nn.Module | None:
    """Return what `transformers` calls the decoder of a model: all but the output embedding. None if there is none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return None if decoder is model else decoder


def load_model(
    name: str,
    dtype: str = "float32",
    revision: str | None = None,
    device: str = "cpu",
    device_map: DeviceMap = None,
    load: Mapping[str, Any] | None = None,
    *,
    tokenizer: str | None = None,
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer from a local folder, else the Hugging Face cache, else the hub.

    An adapter of PEFT is merged into its base model, and comes with the tokenizer that was saved beside it, if any.

    Raises:
        UserError: there is no such folder, model, dtype or device; the hub cannot be reached; or the files hold no
            causal language model with a tokenizer.
    """
    weights = Weights(dtype_of(dtype), device, plain(device_map), loading_options(plain(load)), trust_remote_code)
    adapter = read_local_first(name, revision, find_adapter)
    if adapter is None and base_model is not None:
        raise SettingError(f"{{base_model}}={base_model} is for adapters, and {name} is a whole model: leave it out.")
    source, key = (name, "name") if adapter is None else (base_model or base_of(adapter, name), "base_model")
    of_source = revision if adapter is None else None
    read = partial(read_tokenizer, trust_remote_code=trust_remote_code)
    if tokenizer is not None:
        found = read_local_first(tokenizer, None, read, "tokenizer", TOKENIZER_FILES)
    elif adapter is not None and has_tokenizer(adapter):
        found = read_local_first(str(adapter), None, read)
    else:
        found = read_local_first(source, of_source, read, key)
    model = read_local_first(source, of_source, weights.read, key)
    return (model if adapter is None else merge_adapter(model, adapter, name)), found


@dataclass(frozen=True)
class Weights:
    """How the weights of a model are read, and where they are placed."""

    dtype: torch.dtype
    device: str
    device_map: DeviceMap
    options: Mapping[str, Any]
    trust_remote_code: bool

    def __post_init__(self) -> None:
        if self.device_map is not None and self.device != "auto":
            raise SettingError(
                f"{{device}}={self.device} and {{device_map}}={self.device_map} exclude each other: set one of them."
            )

    def read(self, source: str, **files: Any) -> Any:
        """Return the model of a folder or hub name, on its device.

        Quantised weights are placed while they are read, because some cannot be moved.
        """
        description = read_description(source, self.trust_remote_code, **files)
        device_map = self.device_map
        if device_map is None and "quantization_config" in {**description, **self.options}:
            device_map = {"": resolve_device(self.device)}
        model = read_model(source, self.dtype, device_map, self.options, self.trust_remote_code, **files)
        return place_model(model, self.device) if device_map is None else model


def dtype_of(name: str) -> torch.dtype:
    """Return the floating-point dtype of that name; raise a UserError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SettingError(f"{{dtype}}={name} is not a floating-point dtype: use float32, bfloat16 or float16.")
    return dtype


def place_model(model: Any, device: str | None) -> Any:
    """Move the model to a device; "auto" is CUDA if available, else the CPU; None leaves it where it is."""
    if device is None:
        return model
    device = resolve_device(device)
    try:
        return model.to(device)
    except (AssertionError, RuntimeError, ValueError) as e:  # torch: no such device; transformers: quantised weights
        reason = str(e).splitlines()[0]
        raise SettingError(f"{{device}}={device} cannot hold the model ({reason}): use {{device}}=auto or cpu.") from e


def count_embeddings(model: Any) -> int | None:
    """Return the rows of the embedding; None if the model does not tell."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return getattr(embedding, "num_embeddings", None)


def plain(value: Any) -> Any:
    """Return a node of a config as dicts and lists."""
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value
