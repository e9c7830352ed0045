"""The table of published SAEs: every release finds its reader, which computes what the release's library does."""

from collections.abc import Callable
from pathlib import Path

import published
import pytest
import torch

from sae_lab import load_sae
from sae_lab.interop import load
from sae_lab.interop.listing import find, lines
from sae_lab.interop.releases import UNREADABLE, Release, releases
from sae_lab.ops.sparse import SparseCode
from sae_lab.releases import words_as_search
from sae_lab.runtime.errors import UserError
from sae_lab.saes.base import BaseSAE

READABLE = [name for name, release in releases().items() if release.format not in UNREADABLE]


def write(release: Release, sae_id: str, path: Path) -> published.Formula:
    """Write a small SAE of a release's format to the path that it has in its repository; return its formula."""
    if release.format == "sae_lens":
        return published.sae_lens(
            path, release.overrides.get("normalize_activations", "none"), release.scale.get(sae_id, 1)
        )
    if release.format == "qwen_scope":
        return published.qwen_scope(path, min(release.k or 0, published.F))
    if release.format == "linear_layers":
        return published.linear_layers(path, "" if "deepseek" in release.model else "_linear")
    if release.format == "circuit_tracer":
        one = path.name.startswith("W_enc")
        return published.circuit_tracer_sum(path) if one else published.circuit_tracer_layer(path)
    writer: Callable[[Path], published.Formula] = getattr(published, release.format)
    return writer(path)


def assert_computes(sae: BaseSAE, formula: published.Formula, n: int = 1) -> None:
    """Codes and reconstructions are those of the formula, in float64 from the numbers of the file."""
    x = published.numbers(50, n, published.D, seed=9).double()
    rows = x if n > 1 else x[:, 0]
    code, x_hat = formula(rows)
    sae = sae.double()
    found = sae.encode(x)
    found = found.to_dense() if isinstance(found, SparseCode) else found
    there = sae.predict(x) if sae.n_inputs else sae.reconstruct(x)
    assert 0 < (code > 0).sum() < code.numel()
    torch.testing.assert_close(found, code, rtol=0, atol=1e-5)
    torch.testing.assert_close(there if n > 1 else there[:, 0], x_hat, rtol=0, atol=5e-5)


def test_the_table_is_that_of_sae_lens_in_numbers():
    paths = {name: release.paths() for name, release in releases().items()}
    assert (len(paths), sum(map(len, paths.values()))) == (170, 13857)
    assert sum(len(paths[name]) for name in READABLE) == 13854
    assert len(READABLE) == 168
    assert (
        paths["gemma-scope-2b-pt-res-canonical"]["layer_12/width_16k/canonical"] == "layer_12/width_16k/average_l0_82"
    )


@pytest.mark.parametrize("name", releases())
def test_every_sae_has_a_site_and_a_reader(name):
    release = releases()[name]
    assert release.format in {*load.FORMATS, *load.FILE_FORMATS, *UNREADABLE}
    assert release.d
    for sae_id, path in release.paths().items():
        assert path
        assert "?" not in release.site_of(sae_id)
        assert (release.latents_of(sae_id) or 768) >= 768


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub in a folder, which notes what is asked of it."""
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, allow_patterns: asked.append((repo, allow_patterns)) or str(tmp_path / repo),
    )
    return tmp_path, asked


@pytest.mark.parametrize("name", READABLE)
def test_a_release_is_read(name, hub, monkeypatch):
    """Small files with the names, dtypes and configs of the release, at the path that the table names."""
    release, (folder, asked) = releases()[name], hub
    if release.format == "qwen_scope":
        monkeypatch.setattr(published, "F", 128)  # as many latents as the release has active ones
    sae_id, path = list(release.paths().items())[-1]
    formula = write(release, sae_id, folder / release.repo / path)
    sae = load_sae(name, sae_id=sae_id)
    assert asked[0][0] == release.repo
    assert path in asked[0][1]
    assert (sae.d_in, sae.n_latents) == (published.D, published.F)
    assert bool(sae.n_inputs) == (">" in release.site_of(sae_id))
    assert_computes(sae, formula)


def test_what_the_files_do_not_say_is_known_by_repository_too(hub):
    formula = published.gemma_scope(hub[0] / "google/gemma-scope-2b-pt-transcoders/layer_1/x")
    sae = load_sae("google/gemma-scope-2b-pt-transcoders", sae_id="layer_1/x")
    assert sae.n_inputs == 1
    assert_computes(sae, formula)
    factor = 0.21381938399317255
    published.sae_lens(hub[0] / "jbloom/Gemma-2b-Residual-Stream-SAEs/x", scale=factor)
    with pytest.raises(UserError, match="not the factor of its inputs"):
        load_sae("jbloom/Gemma-2b-Residual-Stream-SAEs", sae_id="x")


@pytest.mark.parametrize("kind", ["crosscoder", "clt"])
def test_layers_of_gemma_scope_2(kind, tmp_path):
    formula = published.gemma_scope_2_layers(tmp_path, kind)
    sae = load_sae(tmp_path)
    assert (sae.n_sources, sae.n_inputs) == ((3, 0) if kind == "crosscoder" else (6, 3))
    assert_computes(sae, formula, n=3)


@pytest.mark.parametrize("kind", ["", "CROSSCODER", "SAE", "NONE"])
def test_crosscoders_of_dictionary_learnings_forks(kind, tmp_path):
    formula = published.crosscoder(tmp_path, kind)
    assert_computes(load_sae(tmp_path), formula, n=2)


def test_a_crosscoder_of_four_matrices(tmp_path):
    formula = published.model_diff(tmp_path / "cc_weights.pt")
    assert_computes(load_sae(tmp_path / "cc_weights.pt"), formula, n=2)


@pytest.mark.parametrize("kind", ["vanilla", "topk", "jumprelu"])
def test_the_batch_topk_repository(kind, tmp_path):
    formula = published.batch_topk(tmp_path, kind)
    assert_computes(load_sae(tmp_path), formula)


def test_a_batch_topk_sae_is_calibrated_first(tmp_path, caplog):
    published.batch_topk(tmp_path, "topk")
    published.describe(tmp_path / "config.json", {"sae_type": "batchtopk", "top_k": 4})
    sae, x = load_sae(tmp_path), published.numbers(64, published.D, seed=9)
    assert "call sae.calibrate" in caplog.text
    sae.calibrate(x, 0)
    assert 3 < float((sae.encode(x).to_dense() > 0).sum(1).double().mean()) < 5


@pytest.mark.parametrize(
    ("file", "tensors", "sentence"),
    [
        ("a.pt", {"w_enc": 1, "w_dec": 1, "b_enc": 1}, "no reader .* knows, .*most like those of Gemma Scope 2"),
        ("a.pt", {"D": 1, "b": 1, "E": 1}, "most like those of a temporal SAE"),
        ("a.pt", {"encoder.weight": 1, "bias": 1}, "most like those of dictionary_learning"),
        ("a.safetensors", {"lm_head": 1}, r"knows, lm_head: a folder may be needed"),
    ],
)  # fmt: skip
def test_a_file_of_another_format_is_named(file, tensors, sentence, tmp_path):
    published.store(tmp_path / file, {name: torch.ones(n) for name, n in tensors.items()})
    with pytest.raises(UserError, match=sentence) as caught:
        load_sae(tmp_path / file)
    assert "again" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"<!doctype html>", "a web page"),
        (b"\x80\x02}q", "a bare pickle"),
        (b"", "empty"),
    ],
)
@pytest.mark.parametrize("name", ["sae.pt", "layer_0.safetensors"])
def test_a_file_that_cannot_be_read_is_named_by_what_it_is(name, content, kind, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=kind) as caught:
        load_sae(tmp_path / name)
    assert "again" not in str(caught.value)


def test_as_many_latents_as_dimensions_leave_the_format_open(tmp_path):
    square = {"W_enc": torch.ones(4, 4), "W_dec": torch.ones(4, 4), "b_enc": torch.ones(4), "b_dec": torch.ones(4)}
    published.store(tmp_path / "a.pt", square)
    with pytest.raises(UserError, match=r"may be of .* or Qwen-Scope or .*it cannot be told which"):
        load_sae(tmp_path / "a.pt")


def test_an_sae_that_reads_whole_texts_is_refused():
    with pytest.raises(UserError, match="temporal-sae-gemma-2-2b is an SAE with attention over a text"):
        load_sae("temporal-sae-gemma-2-2b", sae_id="blocks.12.hook_resid_post")


@pytest.mark.parametrize(
    ("name", "sae_id", "sentence"),
    [
        ("gemma-scope-2b-pt-re", None, "one of the 170 releases known here: did you mean gemma-scope-2b-pt-res"),
        ("qwen-scope-3-8b-base-w64k-l50", "layer99", "has no SAE 'layer99': give sae_id=<one of 36>, such as layer9"),
    ],
)
def test_the_nearest_name_is_offered(name, sae_id, sentence):
    with pytest.raises(UserError, match=sentence):
        load_sae(name, sae_id=sae_id)


def test_words_find_releases():
    assert set(find(["matryoshka", "9b"])) == {"gemma-2-9b-res-matryoshka-dc"}
    assert list(find(["gpt2-small-res-jb"])) == ["gpt2-small-res-jb"]  # not -feature-splitting
    assert len(find(["gemma"])) == 109
    with pytest.raises(UserError, match="search=no such matches none of 170 releases"):
        find(["no", "such"])


def test_a_list_has_ids_sites_sizes_and_the_line_that_loads():
    shown = lines(find(["gemma-scope-2b-pt-res-canonical"]), every=True)
    assert shown[0] == (
        "gemma-scope-2b-pt-res-canonical  (58 SAEs of gemma-2-2b: d=2304, latents=16,384 to 1,048,576; gemma_scope)"
    )
    assert shown[2] == '    load_sae("gemma-scope-2b-pt-res-canonical", sae_id="layer_0/width_16k/canonical")'
    assert "    layer_12/width_65k/canonical   blocks.12.hook_resid_post  65,536 latents" in shown
    assert len(shown) == 3 + 58
    assert lines(find(["gemma-scope-2b-pt-res-canonical"]), every=False)[-1] == "    ... 28 more: add every=true."
    assert lines(find(["llama", "scope"]), every=False)[-1].startswith("7 releases, 288 SAEs.")
    assert "cannot be loaded: it is an SAE with attention" in lines(find(["temporal-sae-gemma-2-2b"]), every=False)[2]


def test_bare_words_are_the_search():
    assert words_as_search(["gemma", "2b", "every=true", "--help"]) == ["every=true", "--help", "search='gemma 2b'"]
    assert words_as_search(["search=x"]) == ["search=x"]
