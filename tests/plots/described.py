"""Descriptions of latents that nobody trained, for the feature page: of any size, and with hostile tokens."""

from typing import Any

import torch

from sae_lab.evaluation.latent_activations import Activations
from sae_lab.evaluation.latent_contexts import LatentsOnText
from sae_lab.evaluation.latents import OF_TOKENS, Latents, spell_ids

HOSTILE = [
    "</script><script>window.pwned=1</script>", "<img src=x onerror='window.pwned=1'>", "<!--", "-->", "]]>", "\u2028",
    '"><svg onload=window.pwned=1>', "${window.pwned=1}", "javascript:window.pwned=1",
    "\x00", "\ud7ff\uffff", "&lt;b&gt;",
]  # fmt: skip


class Words:
    """Tokens are named by their number, but for the first ones, which are hostile, and some words."""

    names = dict(enumerate(HOSTILE)) | {40: " import", 41: "import", 42: "Important", 43: "sys"}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.names.get(i, f" w{i}") for i in ids)


def describe(n_latents: int, n_tokens: int, per_latent: int, context: int = 12, **more: Any) -> dict[str, Any]:
    """Return a description of latents that fire on per_latent random tokens; every tenth is dead.

    Latent i fires on token i mod 50 in half of the cases. No two latents fire on one token.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, min(50_000, 4 * n_tokens), (n_tokens // 128, 128), generator=generator)
    alive = torch.arange(n_latents).repeat_interleave(per_latent)
    alive = alive[alive % 10 != 9]
    positions = torch.randperm(tokens.numel(), generator=generator)[: len(alive)]
    tokens.view(-1)[positions[::2]] = alive[::2] % 50
    order = positions.argsort()
    values = 0.7 + torch.rand(len(order), generator=generator) * (1 + alive[order] % 7)
    activations = Activations(tokens, tokens.numel(), alive[order], positions[order], values)
    on_text = LatentsOnText(activations, n_latents, n_top=10, n_random=0, n_per_decile=1, context=context)
    facts = [weights_of(i, n_latents) | more.get("facts", {}).get(i, {}) for i in range(n_latents)]
    latents = Latents(facts, on_text)
    ids = {*tokens[on_text.shown_rows()].unique().tolist()}
    ids |= {part["token"] for fact in latents.facts for name in OF_TOKENS for part in fact.get(name, [])}
    sae = {"sae": "<b>SAE</b>", "lm": "<i>lm</i>", "models": [], "sites": ["a.<u>", "b"], "n_inputs": 0, "groups": None}
    head = {"schema": 2, "run": "</title><script>window.pwned=1</script>", "n_latents": n_latents, "n_tokens": n_tokens}
    return head | sae | more.get("head", {}) | {"tokens": spell_ids(Words(), ids), "latents": latents}


def weights_of(i: int, n: int) -> dict[str, Any]:
    """Return what the weights of latent i of n might say."""
    return {
        "latent": i,
        "threshold": 0.7,
        "norm": 1 + i / n,
        "neighbours": [{"latent": (i + j) % n, "cosine": 0.5 / j} for j in range(1, 6)],
        "cofiring": [{"latent": (i + 10 * j) % n, "jaccard": 0.5 / j, "share": 0.5} for j in range(1, 6)],
        "promoted": [{"token": 50 + (i + j) % 100, "logit": 1.5 - j / 10} for j in range(10)],
        "suppressed": [{"token": 60 + (i + j) % 100, "logit": j / 10 - 1.5} for j in range(10)],
    }
