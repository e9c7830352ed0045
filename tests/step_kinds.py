"""SAEs of all kinds whose training steps have shapes that do not depend on data, and batches for them."""

import copy
from functools import cache

from conftest import build, planted

CROSS_LAYER = "sae._target_=sae_lab.saes.cross_layer.CrossLayer{}SAE"
JUMPRELU_2025 = ("sae.frequency_coefficient=1", "sae.preact_coefficient=1", "sae.kernel_gradient=all")
STEPS = {
    "batch_topk": (1, "batch_topk"),
    "topk": (1, "topk"),
    "matryoshka": (1, "matryoshka", "sae.group_sizes=[8,24,32]"),
    "hierarchical_topk": (1, "hierarchical_topk"),
    "all_budgets": (2, "hierarchical_topk", "sae.budgets=all", "sae.k_warmup=9"),
    "temporal": (1, "temporal", "sae.group_sizes=[24,40]"),
    "vanilla": (1, "vanilla"),
    "jumprelu": (1, "jumprelu"),
    "jumprelu_2025": (1, "jumprelu", *JUMPRELU_2025),
    "gated": (1, "gated"),
    "p_anneal": (1, "p_anneal", "sae.anneal_start=2", "sae.anneal_end=20"),
    "route": (2, "route"),
    "crosscoder": (2, "batch_topk"),
    "transcoder": (2, "topk", "sae.n_inputs=1", "sae.normalize=mean_norm", "sae.skip=true"),
    "centred": (1, "batch_topk", "sae.normalize=centred"),
    "whitened": (2, "jumprelu", "sae.n_inputs=1", "sae.normalize=whiten"),
    "cross_layer": (4, "batch_topk", CROSS_LAYER.format("BatchTopK"), "sae.normalize=none"),
    "cross_layer_jumprelu": (4, "jumprelu", CROSS_LAYER.format("JumpReLU"), "sae.normalize=none"),
    "mlp": (1, "batch_topk", "sae.hidden=[8]"),
    "tied": (1, "topk", "sae.tied=true"),
    "auxk_of_batch": (1, "batch_topk", "sae.auxk_selection=batch", "sae.encoder_bias=true"),
    "starts": (1, "topk", "sae.encoder_bias=true", "sae.b_dec_init=geometric_median", "sae.b_enc_init=0.2"),
    "warmup": (1, "batch_topk", "sae.k_warmup=9"),
    "abs_topk": (1, "abs_topk"),
    "l1": (1, "batch_topk", "sae.l1_coefficient=0.1"),
    "l1_free_norms": (2, "abs_topk", "sae.l1_coefficient=0.1", "sae.unit_norm=false"),
    "abs_batch_topk": (1, "abs_batch_topk", "sae.auxk_selection=batch", "sae.encoder_bias=true"),
    "abs_matryoshka": (1, "matryoshka", "sae.signed=true", "sae.group_sizes=[8,24,32]"),
}
"""Number of sources and settings of each SAE."""
MORE = {
    "sparsity_warmup": (1, "jumprelu", "sae.sparsity_warmup=15"),
    "resampled": (1, "vanilla", "sae.resample_every=5", "sae.dead_after=2"),
    "p_anneal_gated": (
        *(1, "gated", "sae._target_=sae_lab.saes.p_anneal.PAnnealGatedSAE"),
        *("+sae.anneal_start=2", "+sae.anneal_end=20"),
    ),
    "soft_route": (2, "route", "sae.routing=soft"),
}
"""More of them for tests of many steps: what changes by the step does not change shapes."""


@cache
def built(kind: str):
    n_sources, name, *settings = (STEPS | MORE)[kind]
    return build(name, *settings, n_sources=n_sources).train()


def build_kind(kind: str):
    """The SAE of a row of these tables, built once: composing its config takes 0.1 s."""
    return copy.deepcopy(built(kind))


def rows(sae, seed: int):
    """A batch for an SAE."""
    return planted(48, n_sources=sae.n_sources * (1 + sae.reads_previous), seed=seed)[0]
