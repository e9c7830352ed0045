"""One SAE with its latents on several ranks: gradients, weights, choices and metrics are those of one process."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from conftest import dictionary, planted
from fitting import N_STEPS, fit
from ranks import Call, start_ranks
from torch import nn

from sae_lab.ops.fixed_size import fixed_size
from sae_lab.ops.selection import select_top_k, select_top_of_batch
from sae_lab.parallel.collectives import rank_share
from sae_lab.parallel.gradients import averaged_gradients
from sae_lab.parallel.mesh import data_axis, first_share, latent_axis, sharded_latents
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.registry import Registered

pytestmark = pytest.mark.process

F = 64
DEAD = [*range(20), *range(40, 47)]
LAYOUTS = {"2 shards": (2, False), "4 shards": (4, False), "2 x 2": (2, True)}
"""Number of shards, and whether the two groups of two shards hold different rows."""


@pytest.fixture(scope="module")
def four() -> Iterator[Call]:
    with start_ranks(4) as call:
        yield call


def laid_out(layout: str | None) -> ExitStack:
    """The mesh of a layout; None: one process."""
    stack = ExitStack()
    if layout is not None:
        m, shares_rows = LAYOUTS[layout]
        stack.enter_context(sharded_latents(m))
        if not shares_rows:
            stack.enter_context(first_share())
    return stack


# --- the choice


def chosen(layout: str | None, h: torch.Tensor, k: float, rule: str, mode: tuple[bool, bool]) -> tuple[Any, ...]:
    """The code of this rank's part of h, and which part that is."""
    padded, signed = mode
    with laid_out(layout), fixed_size(padded):
        rows, latents = data_axis().share(len(h)), latent_axis().share(h.shape[1])
        part = [h[rows, latents]]
        select = select_top_of_batch if rule == "batch" else select_top_k
        return rows, latents, select(part, k, signed=signed).to_dense()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_is_that_of_one_process(four, layout):
    generator = torch.Generator().manual_seed(0)
    ties = torch.randint(-3, 4, (32, 48), generator=generator).float()
    lopsided = torch.randn(32, 48, generator=generator)
    lopsided[:, :12] *= 20
    scarce = torch.where(torch.rand(32, 48, generator=generator) < 0.01, 1.0, -1.0)
    for h in (ties, lopsided, scarce, lopsided.bfloat16(), lopsided.double()):
        for rule, k in (("row", 1), ("row", 20), ("batch", 4), ("batch", 7.37)):
            for mode in ((False, False), (True, False), (False, True), (True, True)):
                _, _, alone = chosen(None, h, k, rule, mode)
                for rows, latents, code in four(chosen, layout, h, k, rule, mode):
                    assert torch.equal(code, alone[rows, latents]), (rule, k, mode)


# --- the gradients

SAES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "topk": ("TopKSAE", 1, {"k": 4}),
    "topk signed": ("TopKSAE", 1, {"k": 4, "signed": True, "encoder_bias": True, "l1_coefficient": 0.1}),
    "topk tied": ("TopKSAE", 1, {"k": 4, "tied": True, "b_dec_init": "mean"}),
    "topk mlp": ("TopKSAE", 1, {"k": 4, "hidden": [8]}),
    "batch_topk": ("BatchTopKSAE", 1, {"k": 3.5, "auxk_selection": "batch", "k_aux": 2}),
    "running quantile": ("BatchTopKSAE", 1, {"k": 4, "quantile": "running"}),
    "matryoshka": ("MatryoshkaSAE", 1, {"k": 4, "group_sizes": [4, 20, 40]}),
    "jumprelu": ("JumpReLUSAE", 1, {"k": 4, "bandwidth": 0.5, "b_enc_init": 0.1}),
    "jumprelu tanh": (
        "JumpReLUSAE",
        1,
        {"penalty": "tanh", "kernel_gradient": "all", "frequency_coefficient": 0.1, "preact_coefficient": 0.1},
    ),
    "gated": ("GatedSAE", 1, {"unit_norm": False}),
    "vanilla": ("VanillaSAE", 1, {}),
    "p_anneal": ("PAnnealSAE", 1, {"anneal_start": 0, "anneal_end": 4}),
    "crosscoder": ("BatchTopKSAE", 3, {"k": 4, "decoder_norm": "sum"}),
    "transcoder": ("TopKSAE", 2, {"k": 4, "n_inputs": 1, "skip": True, "normalize": "mean_norm"}),
    "route": ("RouteSAE", 3, {"inner": {"class": "TopKSAE", "config": {"k": 4, "normalize": "none"}}}),
}
ATOL = {"p_anneal": 1e-7}
"""Where 1e-10 is too small: the scale of p_anneal is a ratio of float32 sums."""


def build(name: str) -> BaseSAE:
    kind, n_sources, settings = SAES[name]
    sizes = {"d_in": 16, "n_latents": F, "n_sources": n_sources}
    if kind == "RouteSAE":
        inner = settings["inner"]
        settings = {"inner": inner | {"config": sizes | inner["config"] | {"n_sources": 1}}}
    return Registered.by_name(kind, sizes | settings)


def gradients(layout: str | None, name: str, padded: bool = False) -> dict[str, Any]:
    """Everything that a step computes, with some latents dead."""
    with laid_out(layout), fixed_size(padded):
        sae = build(name).double()
        own = slice(sae.own_latents.start, sae.own_latents.stop)
        x = rank_share(planted(64, n_sources=sae.n_sources)[0].double() + 0.1)
        tensors, axes = sae.state_dict(keep_vars=True), sae.latent_axes()
        with torch.no_grad():
            for key, t in tensors.items():
                if key.endswith("b_dec"):  # not zero, so that what is subtracted matters
                    t.copy_(torch.linspace(-0.3, 0.3, t.numel()).view_as(t))
        sae.resample(x)
        let_die(sae)
        sae.plan_step()
        out = nn.Module.__call__(sae, x)
        fired = {key: t.clone() for key, t in tensors.items() if key.endswith("fired")}
        let_die(sae)  # although they may have fired
        terms = sae.losses(out)
        with averaged_gradients(sae.parameters()):
            torch.stack(list(terms.values())).sum().backward()
        return {
            "own": own,
            "x_hat": out.x_hat.detach(),
            "terms": {key: term.detach() for key, term in terms.items()},
            "gradients": {key: p.grad for key, p in sae.named_parameters()},
            "tensors": {key: t.detach() for key, t in tensors.items()} | fired,
            "axes": axes,
        }


def let_die(sae: BaseSAE) -> None:
    """Set the counters of the latents in DEAD."""
    inner = dictionary(sae)
    counters = torch.zeros(F, dtype=torch.long).index_fill(0, torch.tensor(DEAD), 9)
    inner.batches_since_fired.copy_(counters[inner.own_latents.start : inner.own_latents.stop])


def assert_is_part_of(whole: dict[str, torch.Tensor], got: dict[str, Any], key: str, atol: float) -> None:
    """Tensors of a rank are those of one process, or the slices of its latents."""
    for name, value in whole.items():
        expected = value[got["own"]] if name in got["axes"] else value
        torch.testing.assert_close(got[key][name], expected, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SAES)
def test_the_gradients_are_those_of_one_process(four, name, layout):
    alone = gradients(None, name)
    parts = four(gradients, layout, name)
    assert alone["terms"].get("auxk", torch.ones(())) > 0
    for got in parts:
        assert len(range(*got["own"].indices(F))) == F // LAYOUTS[layout][0]
        assert_is_part_of(alone["gradients"], got, "gradients", ATOL.get(name, 1e-10))
        assert_is_part_of(alone["tensors"], got, "tensors", ATOL.get(name, 1e-10))
    if not LAYOUTS[layout][1]:
        torch.testing.assert_close(parts[0]["x_hat"], alone["x_hat"], rtol=0, atol=1e-10)
        for key, term in alone["terms"].items():  # float32 at any precision
            torch.testing.assert_close(parts[-1]["terms"][key], term, rtol=1e-6, atol=0)


# --- the weights

TRAINED = ["topk", "batch_topk", "matryoshka", "jumprelu", "crosscoder", "transcoder"]


def trained(layout: str | None, name: str) -> dict[str, Any]:
    """A run that clips gradients, with some latents dead from the start."""
    with laid_out(layout):
        sae = build(name)
        let_die(sae)
        batches = [planted(32, n_sources=sae.n_sources, seed=i)[0] for i in range(N_STEPS)]
        own, axes = slice(sae.own_latents.start, sae.own_latents.stop), sae.latent_axes()
        return {
            "own": own,
            "axes": axes,
            "tensors": fit(sae, max_grad_norm=0.05, batches=list(map(rank_share, batches))).sae.state_dict(),
        }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_sae_is_that_of_one_process(four, name, layout):
    alone = trained(None, name)["tensors"]
    for got in four(trained, layout, name):
        assert_is_part_of(alone, got, "tensors", 1e-5)
