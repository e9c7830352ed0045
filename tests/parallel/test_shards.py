"""One SAE with its latents on several ranks: gradients, weights, choices and metrics are those of one process."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import dictionary, planted
from ranks import Call, rank_share, start_ranks
from torch import nn
from traffic import count_bytes

from sae_lab.ops.budgets import split_by_rank
from sae_lab.ops.fixed_size import fixed_size
from sae_lab.ops.selection import select_top_k, select_top_of_batch
from sae_lab.ops.sharded_selection import DIGIT
from sae_lab.parallel.gradients import averaged_gradients
from sae_lab.parallel.mesh import data_axis, first_share, latent_axis, sharded_latents
from sae_lab.planning.exchange import dead_candidates, exchange
from sae_lab.planning.sizes import size_of
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.saes.base import BaseSAE
from sae_lab.saes.files import load_sae_folder, save_sae
from sae_lab.saes.registry import Registered
from sae_lab.training.plans import Plans
from sae_lab.training.step import TrainingStep

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


RULES = [("row", 1), ("row", 20), ("batch", 4), ("batch", 7.37)]
MODES = [(False, False), (True, False), (True, True)]
"""Padded codes, as on a GPU; signed ones."""


def matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ties = torch.randint(-3, 4, (16, 48), generator=generator).float()
    lopsided = torch.randn(16, 48, generator=generator)
    lopsided[:, :12] *= 20
    scarce = torch.where(torch.rand(16, 48, generator=generator) < 0.01, 1.0, -1.0)
    return [ties, lopsided, scarce, lopsided.bfloat16(), lopsided.double()]


def chosen(layout: str | None) -> tuple[slice, slice, list[torch.Tensor]]:
    """Which part of each matrix this rank has, and its code under each rule and mode."""
    codes = []
    with laid_out(layout):
        rows, latents = data_axis().share(16), latent_axis().share(48)
        for h, (rule, k), (padded, signed) in product(matrices(), RULES, MODES):
            select = select_top_of_batch if rule == "batch" else select_top_k
            with fixed_size(padded):
                codes.append(select([h[rows, latents]], k, signed=signed).to_dense())
    return rows, latents, codes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_choice_is_that_of_one_process(four, layout):
    _, _, alone = chosen(None)
    for rows, latents, codes in four(chosen, layout):
        assert [torch.equal(code, whole[rows, latents]) for code, whole in zip(codes, alone, strict=True)] == 60 * [
            True
        ]


def split(layout: str | None) -> tuple[slice, slice, list[torch.Tensor]]:
    """Which part of each matrix this rank has, and its code split by rank in each mode."""
    codes = []
    with laid_out(layout):
        rows, latents = data_axis().share(16), latent_axis().share(48)
        for h, (padded, signed) in product(matrices(), MODES):
            with fixed_size(padded):
                code = select_top_k([h[rows, latents]], 6, signed=signed)
                codes.append(split_by_rank(code, torch.tensor([0, 1, 4])).to_dense())
    return rows, latents, codes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_are_those_of_one_process(four, layout):
    _, _, alone = split(None)
    for rows, latents, codes in four(split, layout):
        for code, whole in zip(codes, alone, strict=True):
            assert torch.equal(code, whole[3 * rows.start : 3 * rows.stop, latents])


# --- the gradients

SAES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "topk": ("TopKSAE", 1, {"k": 4}),
    "topk signed": ("TopKSAE", 1, {"k": 4, "signed": True, "encoder_bias": True, "l1_coefficient": 0.1}),
    "topk tied": ("TopKSAE", 1, {"k": 4, "tied": True, "b_dec_init": "mean"}),
    "topk mlp": ("TopKSAE", 1, {"k": 4, "hidden": [8]}),
    "batch_topk": ("BatchTopKSAE", 1, {"k": 3.5, "auxk_selection": "batch", "k_aux": 2}),
    "running quantile": ("BatchTopKSAE", 1, {"k": 4, "quantile": "running"}),
    "matryoshka": ("MatryoshkaSAE", 1, {"k": 4, "group_sizes": [4, 20, 40]}),
    "hierarchical": ("HierarchicalTopKSAE", 1, {"k": 6, "budgets": [1, 3, 4], "signed": True}),
    "temporal": ("TemporalSAE", 1, {"k": 4}),
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
    # shards of parts of one or two layers; of one or two whole layers; of one layer or half of it
    "cross-layer topk": ("CrossLayerTopKSAE", 6, {"k": 4, "normalize": "mean_norm", "n_latents": 48}),
    "cross-layer batch_topk": ("CrossLayerBatchTopKSAE", 8, {"k": 4, "normalize": "none", "encoder_bias": True}),
    "cross-layer jumprelu": ("CrossLayerJumpReLUSAE", 4, {"k": 4, "normalize": "none", "b_enc_init": 0.1}),
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
        x = rank_share(planted(64, n_sources=sae.n_sources * (1 + sae.reads_previous))[0].double() + 0.1)
        tensors, axes = sae.state_dict(keep_vars=True), sae.latent_axes()
        with torch.no_grad():
            for key, t in tensors.items():
                if key.endswith("b_dec"):  # not zero, so that what is subtracted matters
                    t.copy_(torch.linspace(-0.3, 0.3, t.numel()).view_as(t))
        sae.resample(x)
        let_die(sae)
        Plans(sae).next()
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
    counters = torch.zeros(inner.n_latents, dtype=torch.long).index_fill(0, torch.tensor(DEAD), 9)
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
        assert got["own"].stop - got["own"].start == alone["own"].stop // LAYOUTS[layout][0]
        assert_is_part_of(alone["gradients"], got, "gradients", ATOL.get(name, 1e-10))
        assert_is_part_of(alone["tensors"], got, "tensors", ATOL.get(name, 1e-10))
    if not LAYOUTS[layout][1]:
        torch.testing.assert_close(parts[0]["x_hat"], alone["x_hat"], rtol=0, atol=1e-10)
        for key, term in alone["terms"].items():  # float32 at any precision
            torch.testing.assert_close(parts[-1]["terms"][key], term, rtol=1e-6, atol=0)


# --- the weights

TRAINED = ["topk", "batch_topk", "matryoshka", "hierarchical", "jumprelu", "crosscoder", "transcoder"]
TRAINED += ["cross-layer topk", "cross-layer batch_topk", "cross-layer jumprelu"]


def trained(layout: str | None, name: str) -> dict[str, Any]:
    """A run that clips gradients, with some latents dead from the start."""
    with laid_out(layout):
        sae = build(name)
        let_die(sae)
        step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2, fused=True), max_grad_norm=0.05)
        for i in range(12):
            step(rank_share(planted(32, n_sources=sae.n_sources, seed=i)[0]))
        own = slice(sae.own_latents.start, sae.own_latents.stop)
        return {"own": own, "axes": sae.latent_axes(), "tensors": sae.state_dict()}


@pytest.mark.parametrize("layout", ["4 shards", "2 x 2"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_sae_is_that_of_one_process(four, name, layout):
    alone = trained(None, name)["tensors"]
    for got in four(trained, layout, name):
        assert_is_part_of(alone, got, "tensors", 1e-5)


def scaled(layout: str | None, value: float) -> dict[str, Any]:
    """Steps with a scaled loss, of which the third overflows in the gradient of one latent."""
    with laid_out(layout):
        sae = build("topk")
        step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), lr=1e-2), max_grad_norm=0.05)
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for i in range(5):
            if i == 2 and 5 in sae.own_latents and data_axis().index == 0:
                hook = sae.W_enc.register_hook(lambda grad: grad.index_fill(0, torch.tensor([5]), value))
            step(rank_share(planted(32, seed=i)[0]))
            if i == 2 and 5 in sae.own_latents and data_axis().index == 0:
                hook.remove()
        own = slice(sae.own_latents.start, sae.own_latents.stop)
        tensors = sae.state_dict() | {"scale": torch.tensor(step.scaler.get_scale())}
        return {"own": own, "axes": sae.latent_axes(), "tensors": tensors}


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_all_shards_skip_a_step_whose_gradients_overflow_on_one(four, value):
    alone = scaled(None, value)["tensors"]
    assert alone["scale"] == 2.0**7
    for layout in ("4 shards", "2 x 2"):
        for got in four(scaled, layout, value):
            assert_is_part_of(alone, got, "tensors", 1e-5)


# --- the folder


def saved(layout: str | None, name: str, folder: Path) -> None:
    with laid_out(layout):
        sae = build(name)
        x = planted(8, n_sources=sae.n_sources)[0]
        sae(x)  # sets the scale of mean_norm
        save_sae(sae.eval(), folder, probe_rows=x)


def read(layout: str | None, folder: Path) -> dict[str, Any]:
    with laid_out(layout):
        sae = load_sae_folder(folder)
        own = slice(sae.own_latents.start, sae.own_latents.stop)
        return {"own": own, "axes": sae.latent_axes(), "tensors": sae.state_dict()}


@pytest.mark.parametrize("name", [name for name in SAES if name.startswith("cross-layer")])
def test_shards_of_layers_are_read_whole_and_by_other_shards(four, name, tmp_path):
    four(saved, "4 shards", name, tmp_path / "four")
    saved(None, name, tmp_path / "one")
    whole = read(None, tmp_path / "four")["tensors"]
    assert_is_part_of(read(None, tmp_path / "one")["tensors"], read(None, tmp_path / "four"), "tensors", 1e-6)
    for got in four(read, "2 x 2", tmp_path / "four"):
        assert_is_part_of(whole, got, "tensors", 0)
    for got in four(read, "2 x 2", tmp_path / "one"):  # one file, as all SAEs of before
        assert_is_part_of(whole, got, "tensors", 1e-6)


# --- what it costs

BIG = {"d_in": 64, "n_latents": 16384, "k": 4}


def cost(layout: str | None, kind: str, settings: dict[str, Any]) -> tuple[int, Counter[str]]:
    """Peak memory in tensors of building and training an SAE, and the bytes exchanged in its last step."""
    with laid_out(layout), torch.profiler.profile(profile_memory=True) as profiler:
        sae = Registered.by_name(kind, BIG | settings)
        step = TrainingStep(sae, torch.optim.Adam(sae.parameters(), fused=True), max_grad_norm=1.0)
        for seed in range(2):
            with count_bytes() as exchanged:
                step(torch.randn(64, sae.n_sources, 64, generator=torch.Generator().manual_seed(seed)))
    held = accumulate(e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(held), exchanged


@pytest.mark.parametrize("kind", ["TopKSAE", "BatchTopKSAE", "CrossLayerTopKSAE"])
def test_a_rank_needs_its_share_of_the_memory_and_sends_little(four, kind):
    settings = {"n_sources": 4, "normalize": "none"} if kind.startswith("CrossLayer") else {"n_sources": 1}
    whole, nothing = cost(None, kind, settings)
    assert nothing.total() == 0
    b, d, k, m_limits = 64, 64, 4, {"2 shards": 0.55, "4 shards": 0.3}
    d *= 2 if kind.startswith("CrossLayer") else 1  # of the sources that x_hat has
    for layout, limit in m_limits.items():
        for peak, exchanged in four(cost, layout, kind, settings):
            assert peak <= limit * whole
            # x_hat, b_dec's gradient and a few numbers: the norm of gradients, how many are dead, the least value
            histograms = 6 * 8 * 2**DIGIT if kind == "BatchTopKSAE" else 0  # of a sample of h and of all candidates
            assert exchanged["all_reduce"] <= 4 * (b * d + d) + 64 + histograms
            assert exchanged["all_gather"] <= 4 * k * b + 8 * b
            assert exchanged.keys() <= {"all_reduce", "all_gather"}


@pytest.mark.parametrize(("settings", "k_aux"), [({}, 32), ({"k_aux": 7}, 7), ({"auxk_coefficient": 0.0}, 0)])
def test_a_plan_counts_the_candidates_of_the_code_and_of_the_auxiliary_loss(four, settings, k_aux):
    """All but a few latents are dead in the last of two steps."""
    settings = {"n_sources": 1, "dead_after": 1} | settings
    size = size_of(Registered.by_name("TopKSAE", BIG | settings), k=4)
    assert size.k_aux == k_aux
    for layout, (m, shares_rows) in LAYOUTS.items():
        n = 4 // m if shares_rows else 1
        b = 64 * n  # each rank has 64 rows
        planned = exchange(size, b, n, m, 0, False).candidates + dead_candidates(size, b, n, m)
        assert [(m - 1) * sent["all_gather"] for _, sent in four(cost, layout, "TopKSAE", settings)] == 4 * [planned]


# --- what is refused


def misfit(m: int) -> str:
    with sharded_latents(m), pytest.raises(UserError) as raised:
        build("topk").start_from(build("topk signed"))
    return str(raised.value)


def test_a_sentence_tells_the_shape_of_the_whole(four):
    assert all(f"parameter b_enc ({F},) of a TopKSAE" in got for got in four(misfit, 4))


def refused(kind: str, settings: dict[str, Any], m: int) -> str:
    with sharded_latents(m):
        try:
            Registered.by_name(kind, {"d_in": 16, "n_latents": F, "n_sources": 1} | settings)
        except SettingError as e:
            return str(e)
    return ""


def test_what_cannot_be_sharded_is_refused(four):
    for kind, settings, words in (
        ("PursuitSAE", {"k": 4}, "the latents of a PursuitSAE cannot be sharded: give trainer.shard_latents=1, or"),
        ("VanillaSAE", {"resample_every": 4}, "resample_every compares latents of all shards: give"),
        ("TopKSAE", {"k": 4, "n_latents": 62}, "the number of latents, 62, must be a multiple of trainer.shard_"),
    ):
        assert all(words in got.replace("{", "").replace("}", "") for got in four(refused, kind, settings, 4))
    with sharded_latents(1):
        pass
    with pytest.raises(SettingError, match="=2 must divide the number of processes, which is 1"), sharded_latents(2):
        pass
