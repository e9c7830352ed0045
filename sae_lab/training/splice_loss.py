"""The loss `kl_mse`: what x_hat does to the language model's predictions, beside the SAE's own loss."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_lab.activations.text_batches import TextBatch
from sae_lab.evaluation.downstream import predictions_with
from sae_lab.evaluation.metrics import kl_divergence, to_log_probs
from sae_lab.lm.base import LanguageModel
from sae_lab.lm.predictions import logit_slices
from sae_lab.ops.matmul import float32_products
from sae_lab.parallel.collectives import mean_over_ranks
from sae_lab.saes.base import BaseSAE


class Spliced(NamedTuple):
    """The term of the loss, and the KL divergence in nats."""

    term: Float[Tensor, ""]
    kl: Float[Tensor, ""]


class SpliceLoss:
    """KL divergence between the frozen model's next-token distributions, clean and with x_hat in place of x.

        term = w · mean_predictions KL(p_clean || p_spliced)         w = mse / KL, a constant for the gradient

    So both terms have the same size in every step. Activations are replaced as in the evaluation: at the positions and
    sources on which the SAE is judged. x_hat is that of the training rule. All predictions within rows count.

    The gradient with respect to x_hat is computed with the value, pass by pass of the language model, and slice by
    slice of its logits. It is exact, and no more than one pass's activations and one slice's logits exist at a time.

    Karvonen 2025, arXiv 2503.17272.

    Args:
        lm: the language model at the sites of the SAE.
        rows_per_pass: text rows per pass of the language model.
    """

    def __init__(self, lm: LanguageModel, rows_per_pass: int):
        self.lm, self.rows_per_pass = lm, rows_per_pass

    def __call__(self, sae: BaseSAE, mse: Float[Tensor, ""], batch: TextBatch) -> Spliced:
        """Compute the loss on a batch; `mse` is the reconstruction term of the SAE's own loss."""
        x_hat = sae.autoencode(batch.x)[0]
        with torch.no_grad():
            predicted = sae.predicted_mask(batch.x)
        kl, gradient = self.kl_and_gradient(batch, x_hat.detach(), predicted)
        kl, gradient = kl.to(mse.device), gradient.to(x_hat)
        differentiable = kl + (gradient * (x_hat - x_hat.detach())).sum()  # the value of kl, with its gradient
        kl = mean_over_ranks(kl)  # the weight is that of the whole batch
        return Spliced(mean_over_ranks(mse.detach()) / kl.clamp_min(1e-12) * differentiable, kl)

    def kl_and_gradient(
        self, batch: TextBatch, x_hat: Float[Tensor, "b s d"], predicted: Bool[Tensor, "b s"] | None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "b s d"]]:
        """Return the mean KL divergence over all predictions of a batch, and its gradient with respect to x_hat."""
        n_predictions = batch.tokens[:, 1:].numel()
        tokens, keep = batch.tokens.split(self.rows_per_pass), batch.keep.split(self.rows_per_pass)
        sizes = [int(mask.sum()) for mask in keep]
        masks = [None] * len(sizes) if predicted is None else predicted.split(sizes)
        total, gradients = torch.zeros((), device=self.lm.device), []
        with torch.enable_grad(), torch.autocast(self.lm.device.type, enabled=False), float32_products("highest"):
            for part in zip(tokens, keep, x_hat.split(sizes), masks, strict=True):
                kl, gradient = self._of_pass(*part)
                total += kl
                gradients.append(gradient)
        return total / n_predictions, torch.cat(gradients) / n_predictions

    def _of_pass(self, tokens: Tensor, keep: Tensor, x_hat: Tensor, predicted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of the KL divergences over one pass, and its gradient in the dtype of the model."""
        x_hat = x_hat.to(self.lm.device, self.lm.dtype).requires_grad_()
        with torch.no_grad():
            clean = self.lm.predictions(tokens)

        def kl(logits: Float[Tensor, "r p v"], piece: tuple[slice, slice]) -> Float[Tensor, ""]:
            with torch.no_grad():
                log_p = to_log_probs(clean.logits(*piece))
            is_last = piece[1].stop == tokens.shape[1]  # the last token of a row predicts none
            of_each = kl_divergence(log_p.exp(), log_p, to_log_probs(logits))
            return of_each[:, : -1 if is_last else None].sum()

        pieces = logit_slices(tokens, self.lm.vocab_size)
        value = predictions_with(self.lm, tokens, keep, x_hat, predicted).backward(kl, pieces)
        assert x_hat.grad is not None
        return value, x_hat.grad.float()
