"""Gemma Scope: params.npz."""

import zipfile
from pathlib import Path

import numpy as np
import torch

from sae_lab.interop.tensors import Tensors, add_input_bias, build
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

FILES = (WEIGHTS,) = ("params.npz",)


def read(folder: Path) -> BaseSAE:
    """The JumpReLU SAE of a Gemma Scope folder: relu(h) · 1[h > threshold], h = x W_enc + b_enc.

    The file does not tell a transcoder from an SAE; a folder whose path says transcoder is refused. Rows of the
    embedding SAEs are meant as this file's are: SAELens' are sqrt(d) times as long.

    Raises:
        UserError: what Tensors raises, a transcoder, or a file that holds more than plain arrays.
    """
    file = folder / WEIGHTS
    if "transcoder" in str(folder).lower():
        raise UserError(
            f"{folder} is a transcoder, which its file does not tell from an SAE: save it to a folder by sae-lens, in "
            "an environment of its own, and give that folder."
        )
    try:
        with np.load(file, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    except (OSError, ValueError, zipfile.BadZipFile) as e:  # ValueError: an object array, which is a pickle
        raise UserError(f"{file} cannot be read as plain arrays ({' '.join(str(e).split())}): get it again.") from e
    names = {"w_enc": "W_enc", "w_dec": "W_dec"}
    with Tensors(file, {names.get(name, name): tensor for name, tensor in tensors.items()}) as t:
        W_dec = t.take("W_dec", None, None)
        f, d = W_dec.shape
        ours = {"W_enc": t.take("W_enc", d, f).T, "W_dec": W_dec, "b_enc": t.take("b_enc", f)}
        ours |= {"b_dec": t.take("b_dec", d), "thresholds": t.take("threshold", f).clamp_min(0)}
    sae = build("JumpReLUSAE", ours, penalty="l0", normalize="none")
    add_input_bias(sae)
    return sae
