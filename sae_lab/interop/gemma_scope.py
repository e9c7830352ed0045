"""Read Gemma Scope SAEs and transcoders: params.npz."""

from pathlib import Path

import numpy as np
import torch

from sae_lab.interop.layouts import kind_of_file
from sae_lab.interop.tensors import ONE_TO_ONE, Tensors, add_input_bias, build
from sae_lab.runtime.archives import check_numpy
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

FILES = (WEIGHTS,) = ("params.npz",)


def read(folder: Path, transcoder: bool = False) -> BaseSAE:
    """Read a Gemma Scope folder as a JumpReLU SAE or transcoder.

        h = x W_enc + b_enc
        code = relu(h) · 1[h > threshold]

    SAEs of the embedding keep the file's scale; SAELens rescales theirs to inputs that are sqrt(d) times as long.

    Args:
        folder: folder with params.npz.
        transcoder: whether it predicts the MLP's output from its input. The file does not say it, so a folder with
            "transcoder" in its path is one as well.

    Raises:
        UserError: the errors of Tensors; the file holds more than plain arrays.
    """
    file = folder / WEIGHTS
    transcoder = transcoder or "transcoder" in str(folder).lower()
    try:
        check_numpy(file)
        with np.load(file, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays}
    except UserError:
        raise
    except Exception as e:  # the type depends on what is broken
        reason = " ".join(str(e).split())
        raise UserError(f"{file} cannot be read as plain arrays ({reason}): it is {kind_of_file(file)}.") from e
    names = {"w_enc": "W_enc", "w_dec": "W_dec"}
    with Tensors(file, {names.get(name, name): tensor for name, tensor in tensors.items()}) as t:
        W_dec = t.take("W_dec", None, None)
        f, d = W_dec.shape
        ours = {"W_enc": t.take("W_enc", d, f).T, "W_dec": W_dec, "b_enc": t.take("b_enc", f)}
        ours |= {"b_dec": t.take("b_dec", d), "thresholds": t.take("threshold", f).clamp_min(0)}
    sae = build("JumpReLUSAE", ours, penalty="l0", normalize="none", **(ONE_TO_ONE if transcoder else {}))
    add_input_bias(sae)
    return sae
