"""Activations for training and evaluation, wherever they come from."""

from collections.abc import Iterable, Iterator, Mapping
from glob import glob
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from typing_extensions import Self

from sae_lab.activations import from_text
from sae_lab.activations.building import build_data
from sae_lab.activations.stream import StreamData
from sae_lab.api.composing import compose_config
from sae_lab.cli.help import CONF
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.calls import check_call
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.saes.base import BaseSAE

Array: TypeAlias = Tensor | np.ndarray
"""Numbers in memory."""


def as_tensor(x: Array) -> Tensor:
    """Return an array as a tensor, which shares its memory where torch allows it.

    Raises:
        UserError: torch has no such dtype.
    """
    if isinstance(x, Tensor):
        return x
    try:
        return torch.from_numpy(np.require(x, requirements=["C", "W"]))
    except TypeError as e:
        raise UserError(f"an array of {x.dtype} is no tensor ({first_line(e)}): give x.astype('float32').") from e


class Activations:
    """Where the activations of an SAE come from. Nothing is read before they are used.

        Activations.from_tensor(x)                          # (n, d), or (n, s, d) with axes="nsd"
        Activations.from_lm(load_lm("gpt2"), documents)     # a list of strings, a file of conf/data, or paths
        Activations.from_cache("outputs/cache", lm)         # what python -m sae_lab.harvest wrote

    `for x in activations` gives shuffled batches (b, s, d) without end, the same each time: those that `train_sae`
    trains on. A part is held out, for the evaluation after training.

    Args:
        data: the name of a file of conf/data.
        settings: settings of that file, such as block_tokens, seq_len or exclude_bos.
        lm: the language model; None: there is none.
        objects: arguments of the data that are in memory.
        target: what builds the data, if it is not that of the file.
    """

    def __init__(
        self,
        data: str,
        settings: Mapping[str, Any],
        lm: LanguageModel | None = None,
        objects: Mapping[str, Any] | None = None,
        target: str | None = None,
    ):
        self.choice, self.settings, self.lm, self.objects, self.target = data, settings, lm, objects or {}, target

    @classmethod
    @check_call
    def from_tensor(cls, x: Array, axes: str = "auto", **settings: Any) -> Self:
        """Take the rows of a tensor or array: (n, d), (n, s, d) with axes="nsd", (n, t, d) with axes="ntd"."""
        known = settings if axes == "auto" else {"axes": axes, **settings}
        return cls("tensor", {"path": None, **known}, objects={"tensor": as_tensor(x)})

    @classmethod
    @check_call
    def from_files(cls, path: str | Path, **settings: Any) -> Self:
        """Take the rows of .pt, .safetensors or .npy files, mapped into memory: `data=tensor` of the command."""
        return cls("tensor", {"path": str(path), **settings})

    @classmethod
    @check_call
    def from_lm(cls, lm: LanguageModel, documents: Iterable[str] | str | Path = "stdlib", **settings: Any) -> Self:
        """Take the activations of a language model on documents.

        Args:
            documents: strings; or a file of conf/data, such as "stdlib" or "openwebtext"; or the path of text files.

        Raises:
            UserError: a string is neither.
        """
        if isinstance(documents, str) and (CONF / "data" / f"{documents}.yaml").is_file():
            return cls(documents, settings, lm)
        if isinstance(documents, str | Path):
            if not glob(str(Path(documents).expanduser()), recursive=True):  # noqa: PTH207
                raise UserError(
                    f"documents={str(documents)[:80]!r} is no file of conf/data and matches no file: give a list of "
                    "strings for text itself."
                )
            return cls("text_files", {"paths": [str(documents)], **settings}, lm)
        target = f"{from_text.__name__}.{from_text.in_memory.__name__}"
        return cls("stdlib", settings, lm, {"documents": list(documents)}, target)

    @classmethod
    @check_call
    def from_cache(cls, path: str | Path, lm: LanguageModel, **settings: Any) -> Self:
        """Take activations that `python -m sae_lab.harvest` wrote, of this language model."""
        return cls("cached", {"path": str(path), **settings}, lm)

    def config(self, *overrides: str) -> DictConfig:
        """Return the config of a run on these activations, with overrides as on the command line.

        Raises:
            UserError: a setting is none of the file of conf/data.
        """
        cfg = compose_config(f"data={self.choice}", *overrides)
        if unknown := sorted(set(self.settings) - set(cfg.data)):
            known = ", ".join(name for name in cfg.data if not str(name).startswith("_"))
            raise UserError(f"{unknown[0]} is no setting of data={self.choice}, expected one of {known}.")
        OmegaConf.set_struct(cfg, False)
        typed = {override.partition("=")[0].removeprefix("data.") for override in overrides}
        settings = {name: value for name, value in self.settings.items() if name not in typed}
        cfg.data = {**OmegaConf.to_container(cfg.data, resolve=False), **settings}  # type: ignore[dict-item]
        if self.target is not None:
            cfg.data._target_ = self.target
        if self.lm is not None:
            cfg.lm = self.lm.description or {"_target_": type(self.lm).__name__, "name": self.lm.name}
        OmegaConf.set_struct(cfg, True)
        return cfg

    def data(self, cfg: DictConfig | None = None) -> StreamData:
        """Build the LightningDataModule that a run trains on; `cfg` is what `config` returned."""
        return build_data(self.config() if cfg is None else cfg, self.lm, **self.objects)

    def __iter__(self) -> Iterator[Float[Tensor, "b s d"]]:
        stream = self.data().new_stream()
        try:
            yield from stream
        finally:
            stream.close()


def as_activations(x: Activations | Array, sae: BaseSAE) -> Activations:
    """Return activations; a tensor or array stands for its rows, whose axes are those that the SAE takes.

    Raises:
        UserError: a tensor has another shape.
    """
    if isinstance(x, Activations):
        return x
    x = as_tensor(x)
    n, width = sae.leading(x).numel(), (sae.n_sources, sae.d_in)
    return Activations.from_tensor(x) if x.ndim == 2 else Activations.from_tensor(x.reshape(n, *width), "nsd")
