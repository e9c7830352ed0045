"""Shared by all formats: read files without running code, use each tensor once, and fold weights.

An SAE of another library becomes one of ours with that library's weights. Where the library computes codes
differently, the difference is folded into the weights. Every fold leaves x_hat unchanged. For latent i with decoder
norm n_i = |W_dec_i|:

    add_input_bias      h = x W_encᵀ + b  ->  (x - b_dec) W_encᵀ + b',  b' = b + W_enc b_dec
                        codes: unchanged
    fold_scale          weights for x / r and x_hat / w  ->  W_enc / r, W_dec w, b_dec w, W_skip w / r
                        codes: unchanged
    fold_shift          weights for x - r and x_hat - w  ->  b_dec + w; for a transcoder b_enc - W_enc r
                        codes: unchanged
    fold_mixing         weights for x R and x_hat W⁻¹  ->  W_enc Rᵀ, W_dec W, b_dec W, Wᵀ W_skip Rᵀ
                        codes: unchanged
    fold_decoder_norm   W_dec_i  ->  W_dec_i / n_i;  W_enc_i, biases and threshold of latent i  ->  times n_i
                        codes: code_i  ->  n_i code_i

r and w are the same for an SAE, and R = W⁻¹, so its h needs no new bias: h = (x - b_dec) W_encᵀ holds in both units.
They differ for a transcoder, which reads one site and predicts another; its h is x W_encᵀ + b_enc, without b_dec. A
cross-layer transcoder has one r and one w per layer.

On export, `check_exportable` folds a normalizer that treats all rows alike.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_lab.interop.layouts import kind_of_file, most_like
from sae_lab.interop.safetensors_file import SafetensorsFile
from sae_lab.parallel.mesh import only_latents
from sae_lab.runtime import files
from sae_lab.runtime.archives import check_torch
from sae_lab.runtime.errors import UserError, first_line
from sae_lab.runtime.files import atomic_file
from sae_lab.runtime.memory import check_memory
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.parts.normalize import NORMALIZERS, Context, mix

TRAINING_STATE = ("batches_since_fired", "steps", "threshold_updates", "width")
TRANSCODERS = {
    "sae_lens": ("VanillaSAE", "JumpReLUSAE", "BatchTopKSAE", "MatryoshkaSAE"),
    "sparsify": ("TopKSAE", "MatryoshkaTopKSAE"),
    "circuit_tracer": (
        *("VanillaSAE", "JumpReLUSAE", "BatchTopKSAE", "MatryoshkaSAE"),
        *("CrossLayerJumpReLUSAE", "CrossLayerBatchTopKSAE"),
    ),
}
"""Classes that each format can represent as a transcoder from one site to one other, or from n to n (cross-layer)."""
ONE_TO_ONE = {"n_sources": 2, "n_inputs": 1}
"""Settings of a transcoder from one site to one other."""


class Tensors:
    """The tensors of a file, checked as they are taken: `with Tensors(file, tensors) as t: t.take("W_enc", f, d)`.

    Leaving the context checks that every tensor was taken.

    Raises:
        UserError: a tensor is missing, has the wrong shape, is not finite, or was not taken.
    """

    def __init__(self, source: Any, tensors: Mapping[str, Tensor]):
        self.source, self.left = source, dict(tensors)

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Remove the tensor from the file's and return it in float32. A size of None matches any size."""
        if name not in self.left:
            raise UserError(
                f"{self.source} has no tensor {name!r}: the tensors left in it are {', '.join(self.left) or 'none'}"
                f"{most_like(self.left)}."
            )
        tensor = self.left.pop(name)
        if not isinstance(tensor, Tensor) or not tensor.isfinite().all():
            raise UserError(f"{name!r} of {self.source} is not a tensor of finite numbers: the file is damaged.")
        sizes = list(tensor.shape)
        if len(sizes) != len(shape) or any(want not in (None, size) for size, want in zip(sizes, shape, strict=True)):
            expected = tuple("any" if size is None else size for size in shape)
            raise UserError(
                f"the tensor {name!r} of {self.source} has shape {tuple(sizes)}, expected {expected}: it is of another "
                f"size or format; the tensors left are {', '.join(self.left) or 'none'}."
            )
        return tensor.detach().float()

    def drop(self, *names: str) -> None:
        """Ignore these tensors, if present: only training uses them."""
        for name in names:
            self.left.pop(name, None)

    def __enter__(self) -> "Tensors":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None and self.left:
            raise UserError(
                f"{self.source} has tensors of unknown meaning, {', '.join(self.left)}: it cannot be converted exactly."
            )


def build(name: str, tensors: Mapping[str, Tensor], **config: Any) -> BaseSAE:
    """Return an SAE of class `name` with these tensors as its parameters and buffers, in eval mode.

    The axis s may be missing where it is 1: W_enc and W_dec may be (f, d).
    """
    n_latents, *_, d_in = tensors["W_dec"].shape
    sae = BaseSAE.by_name(name, {"d_in": d_in, "n_latents": n_latents, "encoder_bias": True, **config})
    axes, own = sae.latent_axes(), sae.own_latents
    with torch.no_grad():
        for key, target in sae.state_dict().items():
            if key in tensors:
                tensor = tensors[key].narrow(axes[key], own.start, len(own)) if key in axes else tensors[key]
                target.copy_(tensor.view_as(target))
    return sae.eval()


def check_exportable(
    sae: BaseSAE,
    classes: Collection[str],
    normalizers: Collection[str],
    library: str,
    transcoders: Collection[str] = (),
) -> BaseSAE:
    """Return the SAE in a form that a library can represent, or raise a UserError.

    The result is `sae.deployed()`, or a copy of it with its normalizer folded into the weights if that treats all rows
    alike.

    Args:
        sae: the SAE to export.
        classes: names of the SAE classes that the library can represent.
        normalizers: values of `normalize` that the library can represent.
        library: name of the library, for the error message.
        transcoders: names of the classes that the library can represent as transcoders.

    Raises:
        UserError: the library cannot represent the class, the normalization, several sites, signed codes, an MLP in the
            encoder, or `active_groups`.
    """
    with only_latents(sae.own_latents):  # a slice is converted to a slice
        sae = sae.deployed()
    name, config = type(sae).__name__, sae.config
    if sae.n_inputs:
        check_transcoder(sae, transcoders, library)
    elif name not in classes:
        raise UserError(f"{library} cannot represent a {name}: it can represent {', '.join(classes)}.")
    elif sae.n_sources != 1:
        raise UserError(
            f"{library} cannot represent an SAE of {sae.n_sources} sites: it can represent SAEs of one site."
        )
    if sae.signed:
        raise UserError(
            f"{library} cannot represent sae.signed=true, because none of its activations keeps negative values: "
            "export with format=sae_lab, or train with sae.signed=false."
        )
    shared = [word for word, normalizer in NORMALIZERS.items() if normalizer.shared]
    if config["normalize"] not in (*normalizers, *shared):
        raise UserError(
            f"{library} cannot represent sae.normalize={config['normalize']}: "
            f"train with sae.normalize={' or '.join([*normalizers, *shared])}, or export to another format."
        )
    check_parts(config, library)
    return fold_normalizer(sae) if config["normalize"] in shared else sae


def check_parts(config: Mapping[str, Any], library: str) -> None:
    """Raise a UserError if the SAE has an MLP, or leaves some of its latents out."""
    if config["hidden"]:
        raise UserError(
            f"{library} cannot represent sae.hidden={config['hidden']} (an MLP in the encoder): "
            "train with sae.hidden=[], or export with format=sae_lab."
        )
    if config.get("active_groups") is not None:
        raise UserError(
            f"{library} cannot represent sae.active_groups={config['active_groups']}: save it with active_groups=null."
        )


def check_transcoder(sae: Any, classes: Collection[str], library: str) -> None:
    """Raise a UserError unless the library can represent this transcoder."""
    name = type(sae).__name__
    if name not in classes:
        formats = [f"format={format}" for format, names in TRANSCODERS.items() if name in names]
        known = ", ".join(dict.fromkeys(name for names in TRANSCODERS.values() for name in names))
        fix = f"use {' or '.join(formats)}" if formats else f"no format can; there are formats for {known}"
        raise UserError(f"{library} cannot represent a transcoder of class {name}: {fix}.")
    if sae.n_sources != 2 * sae.layers.n_layers:
        raise UserError(
            f"{library} cannot represent a transcoder from {sae.n_inputs} to {sae.n_sources - sae.n_inputs} sites: "
            "it must read one site and predict one site."
        )


def single_source_tensors(sae: BaseSAE) -> Tensors:
    """Return `inference_tensors` without the axis s, for an SAE that reads one source and writes one."""
    tensors = inference_tensors(sae)
    tensors.left = {key: t.squeeze(-2 if t.ndim > 1 else 0) for key, t in tensors.left.items()}
    return tensors


def inference_tensors(sae: BaseSAE) -> Tensors:
    """Return the tensors that determine codes and reconstructions, without training state; b_enc is 0 if missing."""
    state = {"b_enc": torch.zeros(len(sae.own_latents)), **sae.state_dict()}
    tensors = Tensors(type(sae).__name__, {key: t.detach().cpu() for key, t in state.items()})
    tensors.drop(*TRAINING_STATE)
    return tensors


def take_thresholds(t: Tensors, f: int) -> Tensor:
    """Take one threshold per latent: those of a JumpReLU, or the single inference threshold of a batch-wise rule."""
    return t.take("thresholds", f) if "thresholds" in t.left else t.take("threshold").expand(f)


def fold_normalizer(sae: Any) -> BaseSAE:
    """Return a copy, with untied weights, that works on raw rows and does not normalize.

    It is folded in float64: each weight is rounded once, however many factors and sums go into it.

    Raises:
        UserError: the normalizer has no scale yet.
    """
    read = sae.sources.normalizer.constant()
    written = sae.sources.target_normalizer.constant() if sae.n_inputs else read
    config = sae.config | {"normalize": "none", "tied": False}
    if sae.n_inputs and isinstance(read.shift, Tensor):
        config["encoder_bias"] = True
    with only_latents(sae.own_latents):
        raw = BaseSAE.by_name(type(sae).__name__, config)
    state = {key: t for key, t in sae.state_dict().items() if not key.startswith("sources.")}
    raw.load_state_dict({"b_enc": raw.b_enc, **state} if raw.b_enc is not None else state)
    raw.double()
    read, written = (
        Context(*(t.cpu().double() if isinstance(t, Tensor) else t for t in context)) for context in (read, written)
    )
    if read.unmixing is not None and written.mixing is not None:
        fold_mixing(raw, read.unmixing, written.mixing)
    fold_scale(raw, read.scale, written.scale)
    if isinstance(read.shift, Tensor) and isinstance(written.shift, Tensor):
        fold_shift(raw, read.shift, written.shift)
    return raw.float().eval()


def untie(sae: BaseSAE) -> BaseSAE:
    """Return `sae`, or an untied copy if its weights are tied: a fold scales encoder and decoder differently."""
    return sae.convert_to(type(sae), tied=False) if sae.config.get("tied") else sae


@torch.no_grad()
def add_input_bias(sae: Any) -> None:
    """Adapt b_enc, in place, from an encoder that reads x to ours, which reads x - b_dec.

    Changes nothing for a transcoder: its encoder reads x here too.
    """
    add_to_pre_activations(sae, sae.W_enc.flatten(1) @ sae.encoder_center().flatten())


def add_to_pre_activations(sae: Any, shift: Float[Tensor, " f"]) -> None:
    """Add one number per latent to h, in place."""
    sae.b_enc += shift
    if hasattr(sae, "b_mag"):
        sae.b_mag += sae.r_mag.exp() * shift


@torch.no_grad()
def fold_scale(sae: Any, read: float | Float[Tensor, "r 1"], written: float | Float[Tensor, "w 1"]) -> None:
    """Adapt weights, in place, from an SAE that reads x / read and returns x_hat / written to one in raw units.

    Args:
        sae: the SAE to change. A skip connection must have one source on either side.
        read: r of the module docstring; one per source that is read, or one for all.
        written: w of the module docstring; one per source that is written, or one for all.
    """
    n_layers = sae.layers.n_layers
    by_layer = torch.as_tensor(read).view(n_layers, 1, -1, 1)  # a latent reads only the sources of its layer
    sae.W_enc.copy_((sae.W_enc.unflatten(0, (n_layers, -1)) / by_layer).flatten(0, 1))
    sae.W_dec *= written
    sae.b_dec *= written
    if sae.skip:
        sae.W_skip *= written / read


@torch.no_grad()
def fold_shift(sae: Any, read: Float[Tensor, "r d"], written: Float[Tensor, "w d"]) -> None:
    """Adapt weights, in place, from an SAE that reads x - read and returns x_hat - written to one in raw units."""
    sae.b_dec += written
    if sae.n_inputs:
        by_layer = sae.W_enc.unflatten(0, (sae.layers.n_layers, -1)).flatten(2)
        add_to_pre_activations(sae, -(by_layer @ read.view(len(by_layer), -1, 1)).flatten())
    if sae.skip:
        sae.b_dec -= (sae.W_skip @ read.flatten()).view_as(sae.b_dec)


@torch.no_grad()
def fold_mixing(sae: Any, read: Float[Tensor, "r d d"], written: Float[Tensor, "w d d"]) -> None:
    """Adapt weights, in place, from an SAE that reads x @ read and returns x_hat with x_hat @ written in raw units.

    Args:
        sae: the SAE to change. A skip connection must have one source on either side.
        read: R of the module docstring; symmetric.
        written: W of the module docstring; symmetric.
    """
    n_layers = sae.layers.n_layers
    by_layer = sae.W_enc.unflatten(0, (n_layers, -1))  # a latent reads only the sources of its layer
    sae.W_enc.copy_(torch.einsum("lfrd,lrde->lfre", by_layer, read.unflatten(0, (n_layers, -1))).flatten(0, 1))
    sae.W_dec.copy_(mix(sae.W_dec, written))
    sae.b_dec.copy_(mix(sae.b_dec.unsqueeze(0), written)[0])
    if sae.skip:
        sae.W_skip.copy_(written[0] @ sae.W_skip @ read[0])


@torch.no_grad()
def fold_decoder_norm(sae: Any) -> None:
    """Scale every row of W_dec to unit norm, in place, and adapt the encoder so that x_hat is unchanged.

    Not for rules that compare latents, such as top-k: they would select different latents.
    """
    norms: Float[Tensor, " f"] = sae.W_dec.flatten(1).norm(dim=1).clamp_min(1e-8)
    sae.W_dec /= norms.view(-1, 1, 1)
    sae.W_enc *= norms.view(-1, 1, 1)
    if sae.mlp is not None:
        sae.mlp.W_out *= norms.view(-1, 1)
    for name in sae.pre_activation_parameters:
        if getattr(sae, name) is not None:
            getattr(sae, name).mul_(norms)


def has_unit_rows(sae: Any) -> bool:
    """Whether every row of W_dec has unit norm."""
    return bool((sae.W_dec.flatten(1).norm(dim=1) - 1).abs().max() < 1e-4)


def read_json(file: Path) -> dict[str, Any]:
    try:
        return files.read_json(file)
    except (OSError, ValueError) as e:
        raise UserError(f"{file} cannot be read as a JSON object ({first_line(e)}): it is {kind_of_file(file)}.") from e


def require(config: Mapping[str, Any], key: str, file: Any) -> Any:
    if config.get(key) is None:
        raise UserError(f"{file} has no value for {key!r}, which its format has: it has {', '.join(config)}.")
    return config[key]


def read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        check_memory(file, file.stat().st_size)  # safetensors itself compares its header with the size of the file
        return load_file(file)
    except (OSError, SafetensorError) as e:
        reason = " ".join(str(e).split())
        raise UserError(f"{file} cannot be read as safetensors ({reason}): it is {kind_of_file(file)}.") from e


def read_pickle(file: Path) -> dict[str, Any]:
    """Load a dictionary written by torch.save, with `weights_only=True`, so that no code runs."""
    try:
        check_memory(file, file.stat().st_size)
        check_torch(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as e:  # the type depends on what is broken
        raise UserError(
            f"{file} cannot be loaded ({type(e).__name__}): it is damaged, or a pickle that would run code; it is "
            f"{kind_of_file(file)}. If you trust it, convert it to safetensors."
        ) from e
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, expected a dictionary of tensors.")
    if hollow := [name for name, value in content.items() if isinstance(value, Tensor) and not is_stored(value)]:
        raise UserError(f"{hollow[0]!r} of {file} declares more numbers than the file holds: download it again.")
    return content


def is_stored(tensor: Tensor) -> bool:
    """Return whether every element of a tensor has memory of its own: a short file can declare 10¹⁸ that share one."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def write_safetensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file tensor by tensor; safetensors itself would need the whole file in memory."""
    with atomic_file(file) as f:
        content = SafetensorsFile(f, {name: (t.dtype, t.shape) for name, t in tensors.items()})
        for name, tensor in tensors.items():
            content.put(name, tensor)


def write_pickle(file: Path, tensors: Mapping[str, Tensor]) -> None:
    with atomic_file(file) as f:
        torch.save({name: t.contiguous() for name, t in tensors.items()}, f)
