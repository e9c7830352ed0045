"""Steer a language model with one latent of an SAE: what it writes then, and what that costs on other text."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.activations.data import ActivationData
from sae_lab.evaluation.downstream import with_edit
from sae_lab.evaluation.metrics import cross_entropy, kl_divergence, to_log_probs
from sae_lab.lm.generation import Predict, generate
from sae_lab.lm.predictions import logit_slices
from sae_lab.ops.sparse import SparseCode, fire_counts
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.screen import track
from sae_lab.saes.base import BaseSAE, Edit
from sae_lab.text.encoding import Encoder

Mode = Literal["add", "clamp", "ablate"]
Unit = Literal["max", "norm", "code"]


class Sampling(NamedTuple):
    """How text is generated.

    Attributes:
        n_new: tokens to add to the prompt.
        n_samples: texts for each strength; the same draws for each.
        temperature: 0 takes the most likely token.
        seed: seed of the draws.
    """

    n_new: int = 40
    n_samples: int = 1
    temperature: float = 0.0
    seed: int = 0


def edit_latent(latent: int, mode: Mode, value: float = 0.0) -> Edit:
    """Return the intervention on one latent: add a value to it, clamp it to the value, or set it to zero (ablate)."""

    def edit(code: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        code = code.clone()
        code[:, latent] = code[:, latent] + value if mode == "add" else value if mode == "clamp" else 0.0
        return code

    return edit


def check_choice(mode: str, unit: str) -> None:
    """Raise a UserError unless mode and unit are known."""
    for key, value, known in (("mode", mode, get_args(Mode)), ("unit", unit, get_args(Unit))):
        if value not in known:
            raise UserError(f"{key}={value} is not known: choose {', '.join(known[:-1])} or {known[-1]}.")


def steer(
    sae: BaseSAE,
    data: ActivationData,
    latent: int,
    prompt: str,
    strengths: Sequence[float],
    *,
    mode: Mode = "add",
    unit: Unit = "max",
    n_tokens: int = 8192,
    sampling: Sampling = Sampling(),  # noqa: B008  immutable
) -> dict[str, Any]:
    """Generate text with a latent steered at several strengths, and measure what each costs on held-out text.

    The edit holds at every position on which the SAE is trained; the part of an activation that the SAE does not
    explain stays. The first row of the table is the model without an edit.

    Args:
        strengths: in units of `unit`; of no meaning for mode=ablate.
        unit: `max`: the latent's largest activation on the held-out text; `norm`: what changes the activation by the
            mean norm of activations; `code`: 1.
        n_tokens: held-out tokens on which the latent and the cost are measured.

    Returns:
        The settings, the latent's `max` and `density`, and `table`, with for each strength: `value` (in units of the
        code), `ce` and `ce_increase` (nats per token), `kl` (from the model without an edit) and `texts`.

    Raises:
        UserError: the SAE has no such latent, or `unit` needs it active and it is not.
    """
    if not 0 <= latent < sae.n_latents:
        raise UserError(f"latent={latent} must be a number between 0 and {sae.n_latents - 1}.")
    rows = data.held_out_rows(n_tokens)
    measured = measure_latent(sae, data, latent, rows)
    scale = 0.0 if mode == "ablate" else unit_of_strength(unit, measured, latent)
    edits: list[tuple[float | None, float, Edit | None]] = [(None, 0.0, None)]
    for strength in [0.0] if mode == "ablate" else strengths:
        edits.append((strength, strength * scale, edit_latent(latent, mode, strength * scale)))
    table: list[dict[str, Any]] = []
    for name, value, edit in track(edits, "steering"):
        predict = data.lm.predictions if edit is None else with_edit(data.lm, sae, edit, data.positions.mask_with)
        texts = write_texts(data, predict, prompt, sampling)
        measures = cost(data, predict, rows)
        clean = table[0]["ce"] if table else measures["ce"]
        increase = {"ce_increase": measures["ce"] - clean}
        table.append({"strength": name, "value": value} | measures | increase | {"texts": texts})
    found = {"max": measured["max"], "density": measured["density"], "n_tokens": rows.numel()}
    return {"latent": latent, "mode": mode, "unit": unit, "prompt": prompt, **found, "table": table}


@torch.no_grad()
def measure_latent(sae: BaseSAE, data: ActivationData, latent: int, rows: Int[Tensor, "n t"]) -> dict[str, Any]:
    """Return the latent's largest activation, its density, the mean norm of activations and that of one unit of it.

    And `others`: up to three latents that are active on the most rows.
    """
    largest, n, norm, effect, fires = 0.0, 0, 0.0, 0.0, torch.zeros(sae.n_latents, dtype=torch.long)
    for tokens in rows.split(data.lm_batch_rows):
        x = data.positions.activations(tokens).to(next(sae.parameters()))
        x_hat, code = sae.autoencode(x)
        dense = code.to_dense() if isinstance(code, SparseCode) else code
        changed = sae.reconstruct(x, edit_latent(latent, "add", 1.0))
        values = dense[:, latent].float()
        largest, fires = max(largest, float(values.abs().max())), fires + fire_counts(code).cpu()
        norm, effect = norm + x.flatten(1).norm(dim=1).sum().item(), effect + unit_norm(changed - x_hat)
        n += len(x)
    others = [i for i in fires.argsort(descending=True, stable=True)[:3].tolist() if fires[i]]
    density = int(fires[latent]) / n
    return {"max": largest, "density": density, "norm": norm / n, "effect": effect / n, "others": others}


def unit_norm(change: Tensor) -> float:
    """Return the sum over rows of the norm of a change."""
    return change.flatten(1).norm(dim=1).sum().item()


def unit_of_strength(unit: Unit, measured: dict[str, Any], latent: int) -> float:
    """Return how much of the code a strength of 1 is.

    Raises:
        UserError: the latent is never active, or changes nothing.
    """
    if unit == "code":
        return 1.0
    if unit == "max" and not measured["max"]:
        active = " or ".join(f"latent={i}" for i in measured["others"])
        choose = f"choose one that is ({active}), " if active else ""
        raise UserError(
            f"latent={latent} is not active on the held-out text: {choose}give unit=norm, or raise n_tokens."
        )
    if unit == "norm" and not measured["effect"]:
        raise UserError(f"latent={latent} does not change x_hat: choose another latent.")
    return measured["max"] if unit == "max" else measured["norm"] / measured["effect"]


def write_texts(data: ActivationData, predict: Predict, prompt: str, sampling: Sampling) -> list[str]:
    """Return what the model writes after the prompt: `n_samples` texts."""
    lm = data.lm
    ids = [lm.bos_id, *(int(i) for i in Encoder(lm.tokenizer)([prompt])[0])] if prompt else [lm.bos_id]
    start = torch.tensor([ids] * sampling.n_samples)
    n_new, _, temperature, seed = sampling
    tokens = generate(predict, start, n_new, temperature=temperature, seed=seed, context=lm.context)[:, len(ids) :]
    return [lm.tokenizer.decode(row, clean_up_tokenization_spaces=False) for row in tokens.tolist()]


@torch.no_grad()
def cost(data: ActivationData, predict: Predict, rows: Int[Tensor, "n t"]) -> dict[str, float]:
    """Return the cross-entropy (nats per token) of held-out rows, and the KL divergence from the clean model."""
    ce, kl, n = 0.0, 0.0, 0
    for tokens in rows.split(data.lm_batch_rows):
        clean, steered = data.lm.predictions(tokens), predict(tokens)
        for piece in logit_slices(tokens, data.lm.vocab_size):
            last = slice(None, -1 if piece[1].stop == tokens.shape[1] else None)  # the last token predicts none
            log_p, log_q = (to_log_probs(x.logits(*piece)[:, last]) for x in (clean, steered))
            targets = tokens.roll(-1, dims=1)[piece][:, last].to(log_q.device)
            ce += cross_entropy(log_q, targets).double().sum().item()
            kl += kl_divergence(log_p.exp(), log_p, log_q).double().sum().item()
            n += targets.numel()
    return {"ce": ce / n, "kl": kl / n}
