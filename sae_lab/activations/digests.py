"""Digests that identify the language model, tokenizer and text behind a cache or a checkpoint."""

from collections.abc import Iterator, Mapping

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
        for part in stored_tensors(tensor.detach()):
            digest.update(as_bytes(part.cpu().contiguous()))
    return digest.hexdigest()


def stored_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that hold a tensor's numbers: itself, or those inside a quantised one (a tensor subclass)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from stored_tensors(getattr(tensor, name))


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
