"""Read SAEs that are the state of two nn.Linear in one file of torch.save: Goodfire's and qresearch's."""

from pathlib import Path
from typing import Any

from sae_lab.interop.tensors import Tensors, add_input_bias, build
from sae_lab.saes.base import BaseSAE


def read(file: Path, tensors: dict[str, Any]) -> BaseSAE:
    """Read two linear layers as a Vanilla SAE, whose encoder reads x.

        code = relu(x W_encᵀ + b_enc)
        x̂    = code W_decᵀ + b_dec

    The layers are `encoder_linear` and `decoder_linear` (Goodfire), or `encoder` and `decoder` (qresearch).

    Raises:
        UserError: the errors of Tensors.
    """
    end = "_linear" if "encoder_linear.weight" in tensors else ""
    with Tensors(file, tensors) as t:
        W_enc = t.take(f"encoder{end}.weight", None, None)
        f, d = W_enc.shape
        ours = {"W_enc": W_enc, "b_enc": t.take(f"encoder{end}.bias", f)}
        ours |= {"W_dec": t.take(f"decoder{end}.weight", d, f).T, "b_dec": t.take(f"decoder{end}.bias", d)}
    sae = build("VanillaSAE", ours, normalize="none")
    add_input_bias(sae)
    return sae
