"""Read Gemma Scope SAEs: params.npz."""

from pathlib import Path

import numpy as np
import torch

from sae_lab.interop.tensors import Tensors, add_input_bias, build
from sae_lab.runtime.archives import check_numpy
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

FILES = (WEIGHTS,) = ("params.npz",)


def read(folder: Path) -> BaseSAE:
    """Read a Gemma Scope folder as a JumpReLU SAE.

        h = x W_enc + b_enc
        code = relu(h) · 1[h > threshold]

    The file does not say whether it holds a transcoder, so a folder with "transcoder" in its path is refused. SAEs of
    the embedding keep the file's scale; SAELens rescales theirs to inputs that are sqrt(d) times as long.

    Raises:
        UserError: the errors of Tensors; the path names a transcoder; the file holds more than plain arrays.
    """
    file = folder / WEIGHTS
    if "transcoder" in str(folder).lower():
        raise UserError(
            f"{folder} is a transcoder, which cannot be read from this format: save it with sae-lens in a separate "
            "environment, and load that folder."
        )
    try:
        check_numpy(file)
        with np.load(file, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    except UserError:
        raise
    except Exception as e:  # the type depends on what is broken
        reason = " ".join(str(e).split())
        raise UserError(f"{file} cannot be read as plain arrays ({reason}): download it again.") from e
    names = {"w_enc": "W_enc", "w_dec": "W_dec"}
    with Tensors(file, {names.get(name, name): tensor for name, tensor in tensors.items()}) as t:
        W_dec = t.take("W_dec", None, None)
        f, d = W_dec.shape
        ours = {"W_enc": t.take("W_enc", d, f).T, "W_dec": W_dec, "b_enc": t.take("b_enc", f)}
        ours |= {"b_dec": t.take("b_dec", d), "thresholds": t.take("threshold", f).clamp_min(0)}
    sae = build("JumpReLUSAE", ours, penalty="l0", normalize="none")
    add_input_bias(sae)
    return sae
