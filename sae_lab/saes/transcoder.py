"""Transcoders: the encoder reads some sources of a row, and x_hat is of the others.

    z = activate(x W_encᵀ [+ b_enc]),   y_hat = z W_dec + b_dec [+ x W_skip],   loss = mean (y - y_hat)² + aux

x holds the first `n_inputs` sources, y the others. Where x is what an MLP reads and y what it writes, latents stand
for the MLP's computation, and what each of them reads is told by the weights alone. Any SAE with a linear encoder is
one by sae.n_inputs=1 (of two sites). Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944; the skip connection, which
takes over what is linear in x: Paulo, Shabalin, Belrose 2025, arXiv 2501.18823.
"""

from sae_lab.errors import UserError, checked_flag, checked_number
from sae_lab.saes.normalize import NORMALIZERS


def checked_inputs(n_inputs: int, n_sources: int, normalize: str) -> int:
    """n_inputs, if it leaves a source to predict, in units that do not depend on the row that is predicted.

    Raises:
        UserError: it does not.
    """
    checked_number("sae.n_inputs", n_inputs, 0, whole=True)
    if n_inputs and n_inputs >= n_sources:
        raise UserError(
            f"sae.n_inputs={n_inputs} of {n_sources} sites leaves none to predict: give lm.sites=[<what is read>,"
            "<what is predicted>], or sae.n_inputs=0 for an SAE."
        )
    if n_inputs and normalize in NORMALIZERS and NORMALIZERS[normalize].by_row:
        raise UserError(
            f"sae.normalize={normalize} takes the scale of what is predicted from itself: give a transcoder "
            "sae.normalize=mean_norm or none."
        )
    return n_inputs


def checked_skip(skip: bool, n_inputs: int) -> bool:
    """skip, unless there is nothing that it may lead from: x W_skip of an SAE's own x could be x itself.

    Raises:
        UserError: so it is.
    """
    if checked_flag("sae.skip", skip) and not n_inputs:
        raise UserError("sae.skip=true leads an SAE's input past its latents: it is for transcoders, sae.n_inputs=1.")
    return skip
