"""OpenAI's sparse_autoencoder: one file of torch.save."""

from pathlib import Path

from sae_lab.interop.tensors import Tensors, build, read_pickle, require
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def read(file: Path) -> BaseSAE:
    """The SAE of an OpenAI file: h = (x - pre_bias) W_encᵀ + latent_bias, with TopK on layer-normed rows, or ReLU.

    The file does not say whether rows are normalised; as in OpenAI's loader they are where the activation is TopK.

    Raises:
        UserError: what Tensors raises, or an activation that is neither ReLU nor TopK of positive values.
    """
    state = read_pickle(file)
    activation, arguments = state.pop("activation", "ReLU"), state.pop("activation_state_dict", {})
    config = {"normalize": "none"}
    if activation == "TopK":
        config = {"normalize": "per_token", "k": require(arguments, "k", file)}
    if activation not in ("ReLU", "TopK") or arguments.get("postact_fn", "ReLU") != "ReLU":
        raise UserError(f"{file} has the activation {activation} ({arguments}): known here are ReLU, and TopK of it.")
    with Tensors(file, state) as t:
        W_enc = t.take("encoder.weight", None, None)
        f, d = W_enc.shape
        ours = {"W_enc": W_enc, "b_enc": t.take("latent_bias", f), "b_dec": t.take("pre_bias", d)}
        tied = "decoder.linear.weight" in t.left
        ours["W_dec"] = t.take("decoder.linear.weight", f, d) if tied else t.take("decoder.weight", d, f).T
        t.drop(*STATISTICS)
    return build("TopKSAE" if activation == "TopK" else "VanillaSAE", ours, **config)
