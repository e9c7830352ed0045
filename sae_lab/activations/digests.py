"""Digests that identify the language model, tokenizer and text behind a cache or a checkpoint."""

from collections.abc import Mapping

import torch
import xxhash
from jaxtyping import Int
from torch import Tensor

from sae_lab.runtime.errors import UserError


def weights_digest(model: torch.nn.Module) -> str:
    """Return a digest of the parameters and buffers as loaded, after any folding. 2 GB take a second."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(as_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def digest_of_rows(tokens: Int[Tensor, "r t"]) -> str:
    return xxhash.xxh3_64_hexdigest(as_bytes(tokens))


def check_unchanged(began_with: Mapping[str, str], here: Mapping[str, str], remedy: str) -> None:
    """Raise a UserError that names the digests that changed since the run began. `remedy` ends the message.

    Digests that the run did not record are not compared.
    """
    changed = [name for name in began_with if began_with[name] != here.get(name)]
    if changed:
        raise UserError(f"{' and '.join(changed)} changed since this run began: {remedy}")


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor of any dtype."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
