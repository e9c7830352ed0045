"""Build the data of a config, with the language model that they need."""

from typing import Any

from omegaconf import DictConfig

from sae_lab.activations.data import ActivationData
from sae_lab.activations.stream import StreamData
from sae_lab.runtime.build import build
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.memory import keep_freed_memory

NO_MODEL, TENSOR = "sae_lab.lm.none.NoLM", "sae_lab.activations.tensor.TensorData"


def build_data(cfg: DictConfig, lm: Any = None, **objects: Any) -> StreamData:
    """Build the data and its language model.

    Args:
        lm: a language model that exists already; None: that of the config.
        objects: arguments of the data that exist already, such as a tensor.

    Raises:
        UserError: a setting is invalid, or data of text have no language model, or activations have one.
    """
    without_model, of_tensors = (target(cfg.get(key)) == name for key, name in (("lm", NO_MODEL), ("data", TENSOR)))
    if of_tensors and not without_model:  # before the model is loaded
        raise UserError("data=tensor reads activations and runs no language model: leave out lm=... and lm.*.")
    if without_model and not of_tensors:
        raise UserError("lm=none has no activations: leave it out, or read your own with data=tensor data.path=...")
    keep_freed_memory()
    return build(cfg, "data", lm=build(cfg, "lm") if lm is None else lm, **objects)


def target(node: Any) -> Any:
    return node.get("_target_") if isinstance(node, DictConfig) else None


def require_text(data: StreamData, command: str) -> ActivationData:
    """Return the data; raise a UserError if they are activations without text or language model."""
    if not isinstance(data, ActivationData):
        raise UserError(
            f"{data.name} holds activations without text, which {command} needs: choose data of text, such as "
            "data=text_files, and a language model."
        )
    return data
