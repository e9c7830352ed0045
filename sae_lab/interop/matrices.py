"""Read SAEs and crosscoders that are four matrices in one file of torch.save: Nanda's, Kissane and Krzyzanowski's."""

from pathlib import Path
from typing import Any

from sae_lab.interop.tensors import Tensors, add_input_bias, build
from sae_lab.saes.base import BaseSAE


def read(file: Path, tensors: dict[str, Any]) -> BaseSAE:
    """Read a Vanilla SAE, or a crosscoder of two or more models, which reads x instead of x - b_dec.

        code = relu((x - b_dec) W_enc + b_enc)            W_enc (d, f), W_dec (f, d)
        code = relu(sum_m x_m W_enc_m + b_enc)            W_enc (s, d, f), W_dec (f, s, d), b_dec (s, d)

    Raises:
        UserError: the errors of Tensors.
    """
    with Tensors(file, tensors) as t:
        s = t.left["W_enc"].shape[:-2]
        W_dec = t.take("W_dec", None, *s, None)
        f, d = len(W_dec), W_dec.shape[-1]
        W_enc = t.take("W_enc", *s, d, f).movedim(-1, 0)
        ours = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": t.take("b_enc", f), "b_dec": t.take("b_dec", *s, d)}
    sae = build("VanillaSAE", ours, normalize="none", n_sources=s[0] if s else 1)
    if s:
        add_input_bias(sae)
    return sae
