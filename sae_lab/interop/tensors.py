"""What every format shares: files read without running code, each tensor used once, and the folding rules.

An SAE of another library is built as one of ours with that library's weights, then folded where it computes its codes
differently. For latent i with decoder norm n_i = |W_dec_i|, and every fold leaving x_hat as it was:

    add_input_bias      h = x W_encᵀ + b  ->  (x - b_dec) W_encᵀ + b',  b' = b + W_enc b_dec          codes stay
    fold_scale          x was divided by r, x_hat is by w: W_enc / r, W_dec w, b_dec w, W_skip w / r  codes stay
    fold_decoder_norm   W_dec_i / n_i; W_enc_i, biases and threshold of latent i times n_i     code_i is n_i code_i

r and w are one number for an SAE, two for a transcoder, which reads one site and writes another; its h lacks b_dec. A
cross-layer transcoder has one r and one w a layer: a latent's W_enc has the r of the layer that it reads.

An SAE of ours goes out by way of `exportable`, which folds the scale of a normaliser that has one for all rows.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import atomic_file, write_atomically
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.parts.normalize import NORMALIZERS

TRAINING_STATE = ("batches_since_fired", "steps", "threshold_updates")
TRANSCODERS = {
    "sae_lens": ("VanillaSAE", "JumpReLUSAE", "BatchTopKSAE", "MatryoshkaSAE"),
    "sparsify": ("TopKSAE", "MatryoshkaTopKSAE"),
    "circuit_tracer": (
        *("VanillaSAE", "JumpReLUSAE", "BatchTopKSAE", "MatryoshkaSAE"),
        *("CrossLayerJumpReLUSAE", "CrossLayerBatchTopKSAE"),
    ),
}
"""The classes that a format has a form for as transcoders, from one site, or one a layer, to as many others."""
ONE_TO_ONE = {"n_sources": 2, "n_inputs": 1}
"""The settings that make an SAE such a transcoder."""


class Tensors:
    """The tensors of a file, to be taken by name and shape until none is left: `with Tensors(file, tensors) as t`.

    Raises:
        UserError: a tensor is missing, of another shape or not finite, or one is left over at the end.
    """

    def __init__(self, source: Any, tensors: Mapping[str, Tensor]):
        self.source, self.left = source, dict(tensors)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """The tensor of this name in float32; None stands for any size."""
        if name not in self.left:
            raise UserError(f"{self.source} has no tensor {name!r} (it has {', '.join(self.left)}): get it again.")
        tensor = self.left.pop(name)
        if not isinstance(tensor, Tensor) or not tensor.isfinite().all():
            raise UserError(f"{name!r} of {self.source} is no tensor of finite numbers: get it again.")
        sizes = list(tensor.shape)
        if len(sizes) != len(shape) or any(want not in (None, size) for size, want in zip(sizes, shape, strict=True)):
            due = tuple("any" if size is None else size for size in shape)
            raise UserError(f"the tensor {name!r} of {self.source} has shape {tuple(sizes)} where {due} is due.")
        return tensor.detach().float()

    def drop(self, *names: str) -> None:
        """Tensors that only training reads, where they are there."""
        for name in names:
            self.left.pop(name, None)

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None and self.left:
            raise UserError(
                f"{self.source} has tensors of unknown meaning, {', '.join(self.left)}: it cannot be expressed exactly."
            )


def build(name: str, tensors: Mapping[str, Tensor], **config: Any) -> BaseSAE:
    """The SAE of class `name`, its parameters set to `tensors` (W_enc and W_dec as (f, d) if of one source)."""
    n_latents, *_, d_in = tensors["W_dec"].shape
    sae = BaseSAE.from_config(name, {"d_in": d_in, "n_latents": n_latents, "encoder_bias": True, **config})
    with torch.no_grad():
        for key, target in sae.state_dict().items():
            if key in tensors:
                target.copy_(tensors[key].view_as(target))
    return sae.eval()


def check_exportable(
    sae: BaseSAE,
    classes: Collection[str],
    normalizers: Collection[str],
    library: str,
    transcoders: Collection[str] = (),
) -> BaseSAE:
    """`sae` as a library can have it: itself, or where its normaliser has one scale for all rows, with that folded.

    Args:
        transcoders: which of the classes the library has a form for as transcoders.

    Raises:
        UserError: the library has no form for it: another class or normalisation, several sites, groups left out.
    """
    name, config = type(sae).__name__, sae.config
    if sae.n_inputs:
        check_transcoder(sae, transcoders, library)
    elif name not in classes:
        raise UserError(f"{library} has no form for a {name}: it has one for {', '.join(classes)}.")
    elif sae.n_sources != 1:
        raise UserError(f"{library} has no form for an SAE of {sae.n_sources} sites: it has one for one site.")
    shared = [word for word, normalizer in NORMALIZERS.items() if normalizer.shared]
    if config["normalize"] not in (*normalizers, *shared):
        raise UserError(
            f"{library} has no form for sae.normalize={config['normalize']}: "
            f"train with sae.normalize={' or '.join([*normalizers, *shared])}, or export to another format."
        )
    if config["hidden"]:
        raise UserError(f"{library} has no form for an encoder with an MLP (sae.hidden={config['hidden']}).")
    if config.get("active_groups") is not None:
        raise UserError(f"{library} has no form for active_groups={config['active_groups']}: save it with null.")
    return fold_normalizer(sae) if config["normalize"] in shared else sae


def check_transcoder(sae: Any, classes: Collection[str], library: str) -> None:
    """Raise a UserError unless the library has a form for this transcoder."""
    name = type(sae).__name__
    if name not in classes:
        formats = [f"format={format}" for format, names in TRANSCODERS.items() if name in names]
        known = ", ".join(dict.fromkeys(name for names in TRANSCODERS.values() for name in names))
        fix = f"give {' or '.join(formats)}" if formats else f"no format has; there are forms for {known}"
        raise UserError(f"{library} has no form for a transcoder that is a {name}: {fix}.")
    if sae.n_sources != 2 * sae.n_parts:
        raise UserError(
            f"{library} has no form for a transcoder from {sae.n_inputs} to {sae.n_sources - sae.n_inputs} sites: "
            "it has one from one site to one."
        )


def parts(sae: BaseSAE) -> Tensors:
    """What `whole` gives, without the axis of the one source."""
    tensors = whole(sae)
    tensors.left = {key: t.squeeze(-2 if t.ndim > 1 else 0) for key, t in tensors.left.items()}
    return tensors


def whole(sae: BaseSAE) -> Tensors:
    """The tensors by which `sae` computes its codes, to be taken by a writer."""
    tensors = Tensors(type(sae).__name__, {key: t.detach().cpu() for key, t in state(sae).items()})
    tensors.drop(*TRAINING_STATE)
    return tensors


def thresholds(t: Tensors, f: int) -> Tensor:
    """One a latent: JumpReLU's own, or the one of all that a batch-wise rule is deployed with."""
    return t.take("thresholds", f) if "thresholds" in t.left else t.take("threshold").expand(f)


def state(sae: BaseSAE) -> dict[str, Tensor]:
    """Parameters and buffers, with the bias that an SAE may do without."""
    return {"b_enc": torch.zeros(sae.n_latents), **sae.state_dict()}


def fold_normalizer(sae: Any) -> BaseSAE:
    """A copy that takes and gives rows in raw units without normalising them, its weights untied.

    Raises:
        UserError: the normaliser has no scale yet.
    """
    read = sae.normalizer.divisor().cpu()
    written = sae.target_normalizer.divisor().cpu() if sae.n_inputs else read
    raw = BaseSAE.from_config(type(sae).__name__, sae.config | {"normalize": "none", "tied": False})
    raw.load_state_dict({key: t for key, t in sae.state_dict().items() if "normalizer." not in key})
    fold_scale(raw, read, written)
    return raw.eval()


def untie(sae: BaseSAE) -> BaseSAE:
    """`sae`, or where its weights are tied a copy that has them twice: a fold scales one up and the other down."""
    return sae.convert_to(type(sae), tied=False) if sae.config.get("tied") else sae


@torch.no_grad()
def add_input_bias(sae: Any) -> None:
    """For weights that take x itself: ours take x - b_dec, but for a transcoder's, where this changes nothing."""
    shift = sae.W_enc.flatten(1) @ sae.encoder_center().flatten()
    sae.b_enc += shift
    if hasattr(sae, "b_mag"):
        sae.b_mag += sae.r_mag.exp() * shift


@torch.no_grad()
def fold_scale(sae: Any, read: float | Float[Tensor, "r 1"], written: float | Float[Tensor, "w 1"]) -> None:
    """For weights that take x / read and give x_hat / written; a skip connection leads from one source to one."""
    by_part = torch.as_tensor(read).view(sae.n_parts, 1, -1, 1)  # a latent reads the sources of its part
    sae.W_enc.copy_((sae.W_enc.unflatten(0, (sae.n_parts, -1)) / by_part).flatten(0, 1))
    sae.W_dec *= written
    sae.b_dec *= written
    if sae.skip:
        sae.W_skip *= written / read


@torch.no_grad()
def fold_decoder_norm(sae: Any) -> None:
    """Give every row of W_dec unit norm. The codes change units; a rule that compares latents would choose others."""
    norms: Float[Tensor, " f"] = sae.W_dec.flatten(1).norm(dim=1).clamp_min(1e-8)
    sae.W_dec /= norms.view(-1, 1, 1)
    sae.W_enc *= norms.view(-1, 1, 1)
    if sae.mlp is not None:
        sae.mlp.W_out *= norms.view(-1, 1)
    for name in sae.pre_activation_parameters:
        if getattr(sae, name) is not None:
            getattr(sae, name).mul_(norms)


def has_unit_rows(sae: Any) -> bool:
    return bool((sae.W_dec.flatten(1).norm(dim=1) - 1).abs().max() < 1e-4)


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
        assert isinstance(content, dict)
    except (OSError, ValueError, AssertionError) as e:
        raise UserError(f"{file} cannot be read as a JSON object ({type(e).__name__}): get it again.") from e
    return content


def require(config: Mapping[str, Any], key: str, file: Any) -> Any:
    if config.get(key) is None:
        raise UserError(f"{file} does not say {key!r}: it is incomplete, get it again.")
    return config[key]


def read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{file} cannot be read as safetensors ({' '.join(str(e).split())}): get it again.") from e


def read_pickle(file: Path) -> dict[str, Any]:
    """A file of torch.save, refusing all that is not data."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load raises whatever the broken part does
        raise UserError(
            f"{file} is not read: it is broken, or a pickle that would run code; convert it to safetensors "
            f"where you trust it ({type(e).__name__})."
        ) from e
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__} where a dictionary of tensors is due.")
    return content


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies: the file format takes no two names for the same memory, and tied weights are that.
    write_atomically(file, save({name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}))


def write_pickle(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic_file(file) as f:
        torch.save({name: t.contiguous() for name, t in tensors.items()}, f)
