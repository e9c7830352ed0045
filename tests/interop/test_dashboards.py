"""What Neuronpedia and SAEDashboard are given of latents: their layouts, and the numbers of the text in them."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from conftest import build, compose
from hydra.utils import instantiate
from neuronpedia_tables import ACTIVATION, BATCH, FEATURE, TABLES, check_row

from sae_lab.evaluation.decoder_rows import describe_rows
from sae_lab.evaluation.latents import gather_activations
from sae_lab.interop import sae_dashboard
from sae_lab.runs.dashboards import Names, allowed, layer_of, simplified, write_dashboards
from sae_lab.runtime.errors import UserError
from sae_lab.text.spelling import spell

SIZES = {"n_tokens": 960, "n_top": 3, "n_random": 2, "context": 4, "n_logits": 5, "n_neighbours": 6}
LATENTS = torch.arange(0, 256, 2)
PROVENANCE = {"data": {"paths": ["a.txt", "b.txt"]}}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """An SAE with data of its own: a page of text, and activations of the bundled model."""
    file = tmp_path_factory.mktemp("text") / "page.txt"
    file.write_text((Path(__file__).parents[2] / "docs" / "design.md").read_text())
    overrides = ["data=text_files", f"data.paths=[{file}]", "seq_len=32", "lm.device=cpu", "n_tokens=1024"]
    cfg = compose(*overrides, "data.n_eval_tokens=64", "data.n_val_tokens=64")
    data = instantiate(cfg.data, lm=instantiate(cfg.lm))
    sae = build("batch_topk", "k=8", "sae.normalize=none", d_in=128, n_latents=256)
    sae(data.positions.read(data.text.first_rows(8))[1])
    return sae.eval(), data


def write(read, out: Path, format: str, **names):
    return write_dashboards(*read, LATENTS, format, out, PROVENANCE, Names(**names), **SIZES)


def rows_in(file: Path) -> list[dict]:
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in content.decode().splitlines()]


def test_neuronpedia_can_import_every_row(read, tmp_path):
    write(read, tmp_path, "neuronpedia", source_set="res-256")
    source = tmp_path / "tiny" / "2-res-256"
    for name in ("release", "model", "sourceset", "source"):
        [row] = rows_in(source / f"{name}.jsonl")
        check_row(row, TABLES[name])
    files = sorted(file.relative_to(source).as_posix() for file in source.rglob("*.gz"))
    assert files == ["activations/batch-0.jsonl.gz", "features/batch-0.jsonl.gz"]
    features, activations = (rows_in(source / part / "batch-0.jsonl.gz") for part in ("features", "activations"))
    for table, rows in (("features", features), ("activations", activations)):
        assert {tuple(row) for row in rows} == {tuple(rows[0])}  # the first row names the columns of all
        for row in rows:
            check_row(row, TABLES[table])
    assert [row["index"] for row in features] == [str(i) for i in LATENTS.tolist()]
    assert {row["index"] for row in activations} <= {row["index"] for row in features}  # a foreign key
    assert len({row["id"] for row in activations}) == len(activations)


def test_sae_dashboard_can_read_every_batch(read, tmp_path, monkeypatch):
    monkeypatch.setattr(sae_dashboard, "BATCH", 100)
    (tmp_path / "batch-7.json").write_text("{}")  # of an earlier export of more latents
    write(read, tmp_path, "saedashboard")
    batches = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("batch-*.json"))]
    assert [len(batch["features"]) for batch in batches] == [100, 28]
    for batch in batches:
        check_row(batch, BATCH)
        for feature in batch["features"]:
            check_row(feature, FEATURE)
            for activation in feature["activations"]:
                check_row(activation, ACTIVATION)
                assert len(activation["tokens"]) == len(activation["values"]) <= 2 * SIZES["context"] + 1
    skipped = json.loads((tmp_path / "skipped_indexes.json").read_text())["skipped_indexes"]
    assert skipped == list(range(1, 256, 2))


def test_what_is_shown_is_what_the_sae_does_on_the_text(read, tmp_path):
    sae, data = read
    write(read, tmp_path, "saedashboard")
    [batch] = (json.loads(file.read_text()) for file in tmp_path.glob("batch-*.json"))
    found = gather_activations(sae, data, LATENTS, SIZES["n_tokens"])
    code = sae.encode(data.positions.read(found.tokens)[1])[:, LATENTS]
    fired = 0
    for i, (feature, values) in enumerate(zip(batch["features"], code.T, strict=True)):
        n = int((values > 0).sum())
        assert feature["frac_nonzero"] == pytest.approx(n / len(values))
        assert sum(feature["freq_hist_data_bar_heights"]) == n
        tops = [a for a in feature["activations"] if a["bin_contains"] == -1]
        assert len(tops) <= SIZES["n_top"]
        fired += n > 0
        if n:
            mine = found.latents == i
            strongest = found.tokens.flatten()[found.positions[mine][found.values[mine].argmax()]]
            best, at = tops[0], tops[0]["qualifying_token_index"]
            assert best["tokens"][at] == spell(data.lm.tokenizer, int(strongest))
            assert best["values"][at] == pytest.approx(values.max().item(), abs=1e-4)
            assert best["bin_max"] == pytest.approx(values.max().item(), abs=1e-4)
    assert fired > 20


def test_both_formats_say_the_same(read, tmp_path):
    write(read, tmp_path / "ours", "saedashboard", model="gpt2-small", layer=5, source_set="res", creator="me")
    write(read, tmp_path, "neuronpedia", model="gpt2-small", layer=5, source_set="res", creator="me", release="all")
    [batch] = (json.loads(file.read_text()) for file in (tmp_path / "ours").glob("batch-*.json"))
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("gpt2-small", 5, "res")
    source = tmp_path / "gpt2-small" / "5-res"
    [release] = rows_in(source / "release.jsonl")
    assert (release["name"], release["creatorName"]) == ("all", "me")
    shown = iter(rows_in(source / "activations" / "batch-0.jsonl.gz"))
    for feature, row in zip(batch["features"], rows_in(source / "features" / "batch-0.jsonl.gz"), strict=True):
        assert {name: row[name] for name in feature.keys() & row.keys()} == {
            name: value for name, value in feature.items() if name in row
        }
        for activation in feature["activations"]:
            theirs = next(shown)
            assert (theirs["tokens"], theirs["values"]) == (activation["tokens"], activation["values"])
            assert theirs["maxValue"] == max(activation["values"]) == theirs["values"][theirs["maxValueTokenIndex"]]
        assert row["maxActApprox"] == max([0, *(max(a["values"]) for a in feature["activations"])])
        assert (row["modelId"], row["layer"]) == ("gpt2-small", "5-res")


def test_the_same_latents_give_the_same_bytes(read, tmp_path):
    for name in ("a", "b"):
        write(read, tmp_path / name, "neuronpedia")
    files = [file.relative_to(tmp_path / "a") for file in (tmp_path / "a").rglob("*.jsonl*")]
    assert len(files) == 6
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_decoder_rows_are_described_by_their_logits(read):
    sae, data = read
    described = describe_rows(sae, data.lm, torch.tensor([7, 9]))
    for latent, found in zip((7, 9), described, strict=True):
        row = torch.nn.functional.normalize(sae.W_dec[latent, 0].detach(), dim=0)
        logits = data.lm.unembedding() @ row
        logits = logits - logits.mean()
        histogram = found["logit_histogram"]
        assert sum(histogram["counts"]) == len(logits)
        width = (logits.max() - logits.min()).item() / 50
        assert histogram["middles"][0] == pytest.approx(logits.min().item() + width / 2, abs=1e-4)
        largest = found["largest_dimensions"]
        assert largest["indices"] == row.topk(3).indices.tolist()
        assert largest["shares"][0] == pytest.approx((row.max() / row.abs().sum()).item(), abs=1e-3)


def test_names_are_those_that_a_url_can_have(read, tmp_path):
    assert simplified("google/gemma-2-2b") == "gemma-2-2b"
    assert simplified("/models/My Model") == "my-model"
    assert (layer_of("blocks.11.hook_resid_pre"), layer_of("model.layers.3.mlp")) == (11, 3)
    with pytest.raises(UserError, match=r"site wte has no number of a layer .* give layer=NUMBER"):
        layer_of("wte")
    for name in ("../up", "a/b", "", "res__2", "é"):
        with pytest.raises(UserError, match=r"source_set=.* must consist of letters"):
            allowed("source_set", name)
    with pytest.raises(UserError, match="model=a/b must consist"):
        write(read, tmp_path, "neuronpedia", model="a/b")
    assert list(tmp_path.iterdir()) == []
