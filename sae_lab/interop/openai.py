"""Read SAEs of OpenAI's sparse_autoencoder: one file written by torch.save."""

from pathlib import Path
from typing import Any

from sae_lab.interop.tensors import Tensors, build, require
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def read(file: Path, tensors: dict[str, Any]) -> BaseSAE:
    """Read an OpenAI file as a VanillaSAE (ReLU) or a TopKSAE.

        h = (x - pre_bias) W_encᵀ + latent_bias

    The file does not say whether x is layer-normed. As in OpenAI's loader, it is for TopK and not for ReLU.

    Raises:
        UserError: the errors of Tensors; the activation is neither ReLU nor TopK of positive values.
    """
    state = dict(tensors)
    activation, arguments = state.pop("activation", "ReLU"), state.pop("activation_state_dict", {})
    config = {"normalize": "none"}
    if activation == "TopK":
        config = {"normalize": "per_token", "k": require(arguments, "k", file)}
    if activation not in ("ReLU", "TopK") or arguments.get("postact_fn", "ReLU") != "ReLU":
        raise UserError(
            f"{file} has the activation {activation} ({arguments}): it must be ReLU, or TopK with postact_fn=ReLU."
        )
    with Tensors(file, state) as t:
        W_enc = t.take("encoder.weight", None, None)
        f, d = W_enc.shape
        ours = {"W_enc": W_enc, "b_enc": t.take("latent_bias", f), "b_dec": t.take("pre_bias", d)}
        tied = "decoder.linear.weight" in t.left
        ours["W_dec"] = t.take("decoder.linear.weight", f, d) if tied else t.take("decoder.weight", d, f).T
        t.drop(*STATISTICS)
    return build("TopKSAE" if activation == "TopK" else "VanillaSAE", ours, **config)
