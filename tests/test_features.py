"""Feature pages: what is gathered, what is said of it, and the page that carries it."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import SAE_NAMES, build
from fakes import SETTINGS, Echo, Numbers

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.evaluation.cofiring import describe_cofiring
from sae_lab.evaluation.latent_activations import Activations, gather_activations
from sae_lab.evaluation.latent_contexts import Entries, LatentsOnText, excerpt, fires_on, keep_one_per_window
from sae_lab.evaluation.latent_directions import describe_directions, describe_places, describe_reading
from sae_lab.evaluation.latents import choose_latents, describe_latents, describe_routing
from sae_lab.evaluation.own_text import describe_text, rows_of
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
    x, keep = data.lm.activations(found.tokens).flatten(0, 1), data.positions.mask(found.tokens).flatten()
    code = torch.where(keep.unsqueeze(1), sae.encode(x).detach(), 0)[:, latents]
    assert (code != 0).any(dim=0).sum() > 1
    assert (code < 0).any() == sae.signed
    return data, found, code


@pytest.mark.parametrize("name", SAE_NAMES)
def test_gather_finds_every_activation(name):
    data, found, expected = read_text(name, torch.tensor([3, 4, 5, 8, 11]))
    assert found.tokens.shape == (5, 6)
    assert found.n_positions == int(data.positions.mask(found.tokens).sum())
    mine = torch.zeros_like(expected).index_put((found.positions, found.latents), found.values)
    torch.testing.assert_close(mine, expected)


def test_top_contexts_are_the_strongest_activations_of_the_text():
    """Recomputed from the text: the strongest of each stretch of 3 tokens, in order, and where they stand."""
    _, found, code = read_text("vanilla", torch.arange(16))
    for row, values in zip(LatentsOnText(found, 16, n_top=4, n_random=0, context=1), code.T, strict=True):
        best = values.view(-1, 3).max(dim=1).values.sort(descending=True).values[:4]
        best = best[best > 0].tolist()
        assert [e["activations"][e["centre"]] for e in row["top"]] == pytest.approx(best, abs=1e-4)
        assert row["max"] == pytest.approx(values.max().item())
        for e, value in zip(row["top"], best, strict=True):
            places = (values - value).abs() < 1e-6
            assert e["tokens"][e["centre"]] in found.tokens.flatten()[places]


def activations(entries: list[tuple[int, int, float]]) -> Activations:
    """Entries (latent, position, value) over 4 rows of 25 tokens, whose ids are their positions."""
    latents, positions, values = zip(*sorted(entries, key=lambda entry: entry[1]), strict=True)
    tokens = torch.arange(100).view(4, 25)
    return Activations(tokens, 96, torch.tensor(latents), torch.tensor(positions), torch.tensor(values))


def test_describe():
    found = LatentsOnText(
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
    found, only_negative = LatentsOnText(
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
    entries = Entries(torch.tensor([9, 11, 14]), torch.tensor([3.0, 1.0, 2.0]))
    assert excerpt(tokens, 11, 3, entries) == {
        "tokens": [10, 11, 12, 13, 14],
        "activations": [0, 1, 0, 0, 2],
        "centre": 1,
    }
    assert excerpt(tokens, 9, 3, entries) == {"tokens": [6, 7, 8, 9], "activations": [0, 0, 0, 3], "centre": 3}


def test_deciles_are_tenths_of_the_activations():
    entries = [(0, i, float(i + 1)) for i in range(100)]
    [row] = LatentsOnText(activations(entries), 1, n_top=0, n_random=0, context=0, n_per_decile=2)
    assert [(d["from"], d["to"]) for d in row["deciles"]] == [(10 * i + 1, 10 * i + 10) for i in range(9, -1, -1)]
    for decile in row["deciles"]:
        values = [context["activations"][0] for context in decile["contexts"]]
        assert len({*values}) == 2
        assert all(decile["from"] <= value <= decile["to"] for value in values)
    few, none = LatentsOnText(activations(entries[:3]), 2, n_top=0, n_random=0, context=0, n_per_decile=1)
    assert [(d["from"], d["to"]) for d in few["deciles"]] == [(3, 3), (2, 2), (1, 1)]
    assert none["deciles"] == none["fires_on"] == []


def test_a_latent_fires_on_the_tokens_that_make_up_its_activation():
    found = fires_on(torch.tensor([7, 9, 7, 8]), torch.tensor([1.0, 6.0, -2.0, 1.0]))
    assert found[0] == {"token": 9, "share": 0.6, "count": 1}
    assert found[1] == {"token": 7, "share": 0.3, "count": 2}


def test_cofiring_counts_tokens():
    """0 fires on 4 tokens, 1 on 2 of them, 2 on 1 of them and 9 others, 3 never."""
    entries = [(0, 0, 1.0), (1, 0, 1.0), (0, 1, 1.0), (1, 1, 1.0), (0, 2, 1.0), (0, 3, 1.0)]
    entries += [(2, i, 1.0) for i in range(3, 13)]
    found = describe_cofiring(activations(entries), 4, 5)
    assert found[0] == [
        {"latent": 1, "jaccard": 0.5, "share": 0.5},
        {"latent": 2, "jaccard": pytest.approx(1 / 13, abs=1e-4), "share": 0.25},
    ]
    assert found[1] == [{"latent": 0, "jaccard": 0.5, "share": 1.0}]
    assert found[3] == []


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
    assert choose_latents(sae, 3, 10).tolist() == [3]
    assert choose_latents(sae, "17, 20-22,9", 10).tolist() == [9, 17, 20, 21, 22]
    for wrong in ([64], [-1], [], 64, True, "all", "9-3", "60-64", "", ["a"], [1.5]):
        with pytest.raises(UserError, match="between 0 and 63"):
            choose_latents(sae, wrong, 10)


def test_places_say_what_kind_of_latent_it_is():
    one = SimpleNamespace(models=())
    nested = build("matryoshka", "+sae.group_sizes=[16,16,32]").eval()
    with torch.no_grad():
        nested.threshold.fill_(0.25)
    found = describe_places(nested, one, torch.tensor([0, 15, 16, 63]))
    assert [row["group"] for row in found] == [0, 0, 1, 2]
    assert {row["threshold"] for row in found} == {0.25}
    assert describe_places(build("topk"), one, torch.tensor([3])) == [{}]

    both = build("topk", n_sources=2)
    with torch.no_grad():
        both.W_dec[0, 0], both.W_dec[1, 1] = 0, 0
        both.W_dec[2, 1] = both.W_dec[2, 0]
    found = describe_places(both, SimpleNamespace(models=("base", "tuned")), torch.tensor([0, 1, 2]))
    assert [row["class"] for row in found] == ["tuned_only", "base_only", "shared"]
    assert [row["relative_norm"] for row in found] == [1.0, 0.0, 0.5]
    assert found[0]["writes"][0] == 0 < found[0]["writes"][1]


def test_a_transcoder_reads_tokens():
    sae = build("topk", "sae.n_inputs=1", "sae.normalize=none", n_sources=2)
    embedding = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc[5, 0] = embedding[7] - embedding.mean(dim=0)
    lm = SimpleNamespace(embedding=lambda: embedding, models=())
    [found] = describe_reading(sae, lm, torch.tensor([5]), 3)
    assert found["reads"][0] == {"token": 7, "cosine": 1.0}
    assert describe_reading(build("topk"), lm, torch.tensor([5]), 3) == [{}]


def test_a_route_says_at_which_site_a_latent_fires():
    _, found, _ = read_text("route", torch.arange(16))
    shares = describe_routing(found, 16, 2)
    assert any(row["routed"] != [0, 0] for row in shares)
    for i, row in enumerate(shares):
        mine = found.sites[found.latents == i]
        assert row["routed"][1] == pytest.approx(mine.float().mean().nan_to_num().item(), abs=1e-4)
    _, plain, _ = read_text("topk", torch.arange(16))
    assert describe_routing(plain, 16, 2)[0] == {}


class Spelling:
    """Words are numbers, and a token's text is its number."""

    name_or_path = "numbers"

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def get_vocab(self):
        return {}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def test_own_text_finds_what_fires(monkeypatch):
    data, _, _ = read_text("vanilla", torch.arange(16))
    monkeypatch.setattr(type(data.lm), "tokenizer", Spelling())
    sae = build("vanilla", "sae.normalize=none", d_in=2, n_latents=16, n_sources=2).eval()
    found = describe_text(sae, data, "3 5 8 13 21 34 55", n_latents=4)  # two rows of at most five words and a BOS
    code = sae.encode(data.lm.activations(torch.tensor([[3, 5, 8, 13, 21, 34, 55]]))[0]).detach()
    assert found["read"] == [True] * 7
    assert found["n_active"] == int((code > 0).any(dim=0).sum())
    assert [row["max"] for row in found["latents"]] == pytest.approx(
        code.amax(0).sort(descending=True)[0][:4].tolist(), abs=1e-4
    )
    for row in found["latents"]:
        mine = torch.zeros(7)
        for i, value in row["values"]:
            mine[i] = value
        torch.testing.assert_close(mine, code[:, row["latent"]], atol=1e-4, rtol=0)
    with pytest.raises(UserError, match="text has 0 tokens"):
        describe_text(sae, data, " ")


def test_rows_of_a_text_begin_with_bos():
    rows, places = rows_of(torch.arange(1, 6), seq_len=4, bos_id=0)
    assert rows.tolist() == [[0, 1, 2, 3], [0, 4, 5, 0]]
    assert rows.flatten()[places].tolist() == [1, 2, 3, 4, 5]
    assert rows_of(torch.arange(1, 3), seq_len=8, bos_id=0)[0].tolist() == [[0, 1, 2]]


def test_a_whole_description(monkeypatch, tmp_path):
    data, _, _ = read_text("batch_topk", torch.arange(16))
    monkeypatch.setattr(type(data.lm), "tokenizer", Spelling())
    monkeypatch.setattr(type(data.lm), "unembedding", lambda self: None, raising=False)
    sae = build("batch_topk", "sae.normalize=none", d_in=2, n_latents=16, n_sources=2).eval()
    sizes = {"n_tokens": 30, "n_top": 2, "n_random": 1, "context": 1, "n_logits": 2, "n_neighbours": 2}
    description = describe_latents(sae, data, torch.tensor([1, 4, 9]), **sizes)
    page, table = write_page({"run": "a"} | description, tmp_path)
    assert json.loads(table.read_text())["latents"] == json.loads(json.dumps(description["latents"][:]))
    assert json.loads(table.read_text())["schema"] == 2
    assert [row["latent"] for row in description["latents"]] == [1, 4, 9]
    assert page.read_text().count('id="block-') == 5
