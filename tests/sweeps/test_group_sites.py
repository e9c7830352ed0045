"""Runs at different sites that share a stream: each equals the same run alone to the bit."""

import logging
from pathlib import Path

import pytest
import torch
from groups import assert_same_run, config, stop_at_batch, train_each

from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.errors import Interrupted
from sae_lab.sweeps import shared_stream
from sae_lab.sweeps.shared_stream import group_by_stream, train_jobs
from sae_lab.sweeps.status import read_status
from sae_lab.training.job import read_job
from sae_lab.training.run import build_data, train_run

# Early and late sites, the same site twice, crosscoders in two orders, a transcoder; two rules of activation.
MEMBERS = {
    "early": ["lm.sites=[transformer.h.0]", "sae=topk", "k=4"],
    "late": ["lm.sites=[transformer.h.3]", "sae=batch_topk", "k=8"],
    "late too": ["lm.sites=[blocks.3.hook_resid_post]", "sae=vanilla"],
    "crosscoder": ["lm.sites=[transformer.h.3,transformer.h.0]", "sae=batch_topk", "k=8"],
    "transcoder": ["experiment=transcoder", "sae=topk", "k=4"],
}
FEW = {name: MEMBERS[name] for name in ("early", "crosscoder", "transcoder")}
WIDE = ["lm.sites=[blocks.1.mlp.hook_post]", "sae=topk", "k=4"]


def jobs(root: Path, **members: list[str]):
    return [read_job(config(root / name, *overrides)) for name, overrides in members.items()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return train_each(tmp_path_factory.mktemp("alone"), MEMBERS)


def test_a_member_equals_the_same_run_alone(alone, tmp_path, caplog):
    asked = jobs(tmp_path, **MEMBERS)
    assert len(group_by_stream(asked)) == 1
    with caplog.at_level(logging.INFO):
        train_jobs(asked)
    # 512 tokens x 5 sites x 128 x 4 bytes; blocks.3.hook_resid_post is another name of transformer.h.3.
    assert "5 SAEs share one pass over tiny (5 sites, 0.0012 GiB a block)" in caplog.text
    for name in MEMBERS:
        assert_same_run(alone / name, tmp_path / name)
        assert (alone / name / "sae" / "config.json").read_text() == (
            tmp_path / name / "sae" / "config.json"
        ).read_text()


def test_the_clean_passes_are_those_of_one_run(tmp_path, monkeypatch):
    rows = {"activations": 0, "predictions": 0}
    for method in rows:
        original = getattr(LanguageModel, method)

        def counting(lm, tokens, *args, _method=method, _original=original, **kwargs):
            rows[_method] += len(tokens) * (len(tokens) > 1)  # LanguageModel.is_split tries one row
            return _original(lm, tokens, *args, **kwargs)

        monkeypatch.setattr(LanguageModel, method, counting)
    train_jobs(jobs(tmp_path / "one", early=MEMBERS["early"]))
    one = dict(rows)
    train_jobs(jobs(tmp_path / "all", **FEW))
    assert rows["activations"] == 2 * one["activations"]
    # Of each held-out row: clean, and for each choice of sites zero, mean and x_hat; batch_topk has two rules.
    n_rows = one["predictions"] // 4
    assert rows["predictions"] - one["predictions"] == n_rows * (1 + 3 * 3 + 1)


def test_a_stopped_sweep_is_continued_together_or_alone(alone, tmp_path, monkeypatch):
    stop_at_batch(monkeypatch, 7)
    with pytest.raises(Interrupted, match="at step 6 of 12, 3 SAEs saved"):
        train_jobs(jobs(tmp_path, **FEW))
    monkeypatch.undo()
    train_run(config(tmp_path / "crosscoder", *MEMBERS["crosscoder"]))
    train_jobs(jobs(tmp_path, **FEW))
    for name in FEW:
        assert_same_run(alone / name, tmp_path / name)


def test_sites_that_cannot_be_read_together_are_trained_apart(alone, tmp_path, caplog):
    wrong = {"unknown": "lm.sites=[transformer.h.33]", "none": "lm.sites=[]"}
    asked = {"wide": WIDE, **{name: [sites] for name, sites in wrong.items()}, "early": MEMBERS["early"]}
    asked |= {"late": MEMBERS["late"], "wide too": [*WIDE, "k=5"]}
    with caplog.at_level(logging.INFO):
        train_jobs(jobs(tmp_path, **asked))
    assert [r.args[0] for r in caplog.records if "share one pass" in r.msg] == [2, 2]
    assert read_status(tmp_path / "unknown")[1].startswith(
        "lm.sites: tiny has no site 'transformer.h.33': did you mean"
    )
    assert read_status(tmp_path / "none")[1].startswith("lm.sites=[] must name at least one site")
    for name in ("wide", "wide too"):
        assert read_status(tmp_path / name)[0] == "complete"
    for name in ("early", "late"):
        assert_same_run(alone / name, tmp_path / name)


@pytest.mark.parametrize(("site", "groups"), [(0, [3]), (1, [2, 1])])
def test_a_group_counts_the_block_of_all_its_sites(tmp_path, monkeypatch, site, groups):
    """Memory for three SAEs and the block of one site."""
    block, n_parameters = 512 * 128 * 4, 2 * 256 * 128 + 256 + 128
    monkeypatch.setattr(shared_stream, "free_memory", lambda device: 2 * 16 * 3 * n_parameters + block + 1000)
    found = []
    monkeypatch.setattr(shared_stream, "train_members", lambda members, views: found.append(len(members)))
    overrides = {
        name: [f"lm.sites=[transformer.h.{i}]", "sae=topk", "k=4"] for name, i in zip("abc", (0, 0, site), strict=True)
    }
    train_jobs(jobs(tmp_path, **overrides))
    assert found == groups


def test_members_take_passes_of_the_size_that_they_take_alone(tmp_path, monkeypatch):
    """The size may decide bits, and on a GPU depends on what the sites leave of its memory."""
    monkeypatch.setattr("sae_lab.activations.data.rows_per_pass", lambda lm, *_: 4 if len(lm.sites) == 1 else 2)
    found = []

    def note(members, views):
        data = views.joined(member.data for member in members)
        found.append((len(members), len(data.lm.sites), data.lm_batch_rows))

    monkeypatch.setattr(shared_stream, "train_members", note)
    train_jobs(jobs(tmp_path, **{name: MEMBERS[name] for name in ("early", "crosscoder", "late")}))
    assert found == [(2, 2, 4), (1, 2, 2)]


def test_activations_at_a_site_do_not_depend_on_the_others(tmp_path):
    data = build_data(config(tmp_path, "lm.sites=[transformer.h.2,transformer.h.0]"))
    tokens = data.text.first_rows(4)
    both = data.lm.activations(tokens)
    for i, site in enumerate(data.lm.sites):
        view = data.with_sites([site])
        assert (view.lm.sites, view.n_sources, data.n_sources) == ((site,), 1, 2)
        assert torch.equal(view.lm.activations(tokens)[:, :, 0], both[:, :, i])
        assert view.state_dict() == data.state_dict()
