"""Feature pages: what is gathered, what is said of it, and the page that carries it."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import SAE_NAMES, build
from fakes import SETTINGS, Echo, Numbers

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.evaluation.latents import (
    Activations,
    choose_latents,
    describe_activations,
    describe_directions,
    excerpt,
    gather_activations,
    keep_one_per_window,
)
from sae_lab.plots.feature_page import write_page
from sae_lab.runtime.errors import UserError


class Waves(Echo):
    """A token's activations are points on circles, so that many latents have something to fire on."""

    def activations(self, tokens):
        angle = tokens[:, :, None] * torch.tensor([1.0, 3.0])
        return torch.stack([angle.cos(), angle.sin()], dim=-1)


def read_text(name: str, latents: torch.Tensor) -> tuple[ActivationData, Activations, torch.Tensor]:
    """The data, what is gathered of 30 tokens, and, recomputed, each of the latents on each token."""
    data = from_documents(Waves(), Numbers, order="shuffled", **SETTINGS)
    sae = build(name, "sae.normalize=none", d_in=2, n_latents=16, n_sources=2).eval()
    found = gather_activations(sae, data, latents, n_tokens=30)
    x, keep = data.lm.activations(found.tokens).flatten(0, 1), data.keep_mask(found.tokens).flatten()
    code = torch.where(keep.unsqueeze(1), sae.encode(x).detach(), 0)[:, latents]
    assert (code != 0).any(dim=0).sum() > 1
    assert (code < 0).any() == sae.signed
    return data, found, code


@pytest.mark.parametrize("name", SAE_NAMES)
def test_gather_finds_every_activation(name):
    data, found, expected = read_text(name, torch.tensor([3, 4, 5, 8, 11]))
    assert found.tokens.shape == (5, 6)
    assert found.n_positions == int(data.keep_mask(found.tokens).sum())
    mine = torch.zeros_like(expected).index_put((found.positions, found.latents), found.values)
    torch.testing.assert_close(mine, expected)


def test_top_contexts_are_the_strongest_activations_of_the_text():
    """Recomputed from the text: the strongest of each stretch of 3 tokens, in order, and where they stand."""
    _, found, code = read_text("vanilla", torch.arange(16))
    for row, values in zip(describe_activations(found, 16, n_top=4, n_random=0, context=1), code.T, strict=True):
        best = values.view(-1, 3).max(dim=1).values.sort(descending=True).values[:4]
        best = best[best > 0].tolist()
        assert [e["activations"][e["centre"]] for e in row["top"]] == pytest.approx(best, abs=1e-4)
        assert row["max"] == pytest.approx(values.max().item())
        for e, value in zip(row["top"], best, strict=True):
            places = (values - value).abs() < 1e-6
            assert e["tokens"][e["centre"]] in found.tokens.flatten()[places]


def activations(entries: list[tuple[int, int, float]]) -> Activations:
    """Entries (latent, position, value) over 4 rows of 25 tokens, whose ids are their positions."""
    latents, positions, values = zip(*entries, strict=True)
    tokens = torch.arange(100).view(4, 25)
    return Activations(tokens, 96, torch.tensor(latents), torch.tensor(positions), torch.tensor(values))


def test_describe():
    found = describe_activations(
        activations([(0, 30, 2.0), (2, 5, 1.0), (0, 3, 4.0), (0, 31, 1.0)]), 3, n_top=1, n_random=5, context=2
    )
    assert [row["density"] for row in found] == [3 / 96, 0.0, 1 / 96]
    assert [row["max"] for row in found] == [4.0, 0.0, 1.0]
    assert found[0]["top"] == [{"tokens": [1, 2, 3, 4, 5], "activations": [0, 0, 4.0, 0, 0], "centre": 2}]
    assert [e["activations"] for e in found[0]["random"]] == [[0, 0, 2.0, 1.0, 0]]  # 31 stands in the window of 30
    assert found[1]["top"] == found[1]["random"] == found[0]["bottom"] == []
    assert sum(found[0]["histogram"]["counts"]) == 3
    assert found[0]["histogram"]["counts"][-1] == 1


def test_both_ends_of_a_signed_latent_are_shown_apart():
    found, only_negative = describe_activations(
        activations([(0, 3, 4.0), (0, 12, -3.0), (0, 30, -5.0), (0, 40, 1.0), (0, 60, -1.0), (1, 3, -2.0)]),
        2, n_top=1, n_random=5, context=2,
    )  # fmt: skip
    assert [e["activations"][e["centre"]] for e in found["top"]] == [4.0]
    assert [e["activations"][e["centre"]] for e in found["bottom"]] == [-5.0]
    assert sorted(e["activations"][e["centre"]] for e in found["random"]) == [-3.0, -1.0, 1.0]
    assert (found["max"], found["min"], found["density"]) == (4.0, -5.0, 5 / 96)
    assert (found["histogram"]["bottom"], found["histogram"]["top"]) == (-5.0, 4.0)
    assert sum(found["histogram"]["counts"]) == 5
    assert (only_negative["max"], only_negative["min"], only_negative["top"]) == (0.0, -2.0, [])
    assert len(only_negative["bottom"]) == 1


def test_neighbours_of_a_signed_latent_may_point_the_other_way():
    for name, nearest in (("topk", {"latent": 9, "cosine": 0.8}), ("abs_topk", {"latent": 2, "cosine": -1.0})):
        sae = build(name, d_in=8, n_latents=12)
        with torch.no_grad():
            sae.W_dec[:] = torch.eye(8)[1:2]
            sae.W_dec[5, 0], sae.W_dec[2, 0] = torch.eye(8)[0], -torch.eye(8)[0]
            sae.W_dec[9, 0] = torch.tensor([0.8, 0.6, *6 * [0.0]])
        lm = SimpleNamespace(unembedding=lambda: None)
        (described,) = describe_directions(sae, lm, torch.tensor([5]), 3, 2)
        assert described["neighbours"][0] == nearest


def test_an_excerpt_stays_in_its_row():
    tokens = torch.arange(20).view(2, 10)
    assert excerpt(tokens, 11, 3, {11: 1.0})["tokens"] == [10, 11, 12, 13, 14]
    assert excerpt(tokens, 9, 3, {})["tokens"] == [6, 7, 8, 9]


def test_apart_keeps_the_first_of_a_window():
    assert keep_one_per_window(torch.tensor([12, 40, 14, 10, 3]), context=2).tolist() == [12, 40, 3]


def test_directions_name_what_a_decoder_row_writes():
    sae = build("topk", d_in=8, n_latents=12)
    unembedding = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_dec[5, 0] = unembedding[7] / unembedding[7].norm()
        sae.W_dec[9, 0] = sae.W_dec[5, 0]
        sae.W_dec[2, 0] = -unembedding[7] / unembedding[7].norm()
    lm = SimpleNamespace(unembedding=lambda: unembedding)
    first, second = describe_directions(sae, lm, torch.tensor([5, 2]), n_logits=3, n_neighbours=2)
    logits = sae.W_dec[5, 0].detach() @ unembedding.T
    assert first["promoted"][0]["token"] == int(logits.argmax())
    assert first["promoted"][0]["logit"] == pytest.approx(float(logits.max() - logits.mean()), abs=1e-3)
    assert [p["token"] for p in second["suppressed"]] == [p["token"] for p in first["promoted"]]
    assert first["neighbours"][0] == {"latent": 9, "cosine": 1.0}
    narrow = SimpleNamespace(unembedding=lambda: unembedding[:, :4])
    assert "promoted" not in describe_directions(sae, narrow, torch.tensor([5]), 3, 2)[0]


def test_choose():
    sae = build("topk", n_latents=64)
    assert choose_latents(sae, None, 1024).tolist() == list(range(64))
    assert len(set(choose_latents(sae, None, 10).tolist())) == 10
    assert choose_latents(sae, [9, 3, 3], 10).tolist() == [3, 9]
    for wrong in ([64], [-1], [], 3, "all", ["a"], [1.5]):
        with pytest.raises(UserError, match="between 0 and 63"):
            choose_latents(sae, wrong, 10)


def test_the_page_carries_the_json(tmp_path):
    description = {"run": "a", "tokens": {1: "</script><b>"}, "latents": [{"latent": 0}]}
    page, table = write_page(description, tmp_path)
    text = page.read_text()
    assert "<b>" not in text
    carried = re.search(r"^const data = (.*);$", text, re.MULTILINE)[1]
    assert json.loads(carried) == json.loads(table.read_text()) == json.loads(json.dumps(description))
