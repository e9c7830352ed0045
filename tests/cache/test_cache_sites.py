"""A cache of several sites serves any of them, in the order asked for, to the bit of a cache of these sites only."""

from pathlib import Path

import pytest
from conftest import equal
from groups import assert_same_run, config

from sae_lab.cache.writer import CacheWriter
from sae_lab.runtime.errors import UserError
from sae_lab.sweeps.shared_stream import train_jobs
from sae_lab.sweeps.status import read_status
from sae_lab.training.job import read_job
from sae_lab.training.run import build_data, train_run

A, B, C, D = (f"transformer.h.{i}" for i in range(4))
SUBSETS = {"one": [B], "two": [A, D], "turned": [D, A]}


def choose(sites: list[str]) -> str:
    return f"lm.sites=[{','.join(sites)}]"


def harvest(folder: Path, sites: list[str]) -> str:
    """A cache of 1,300 rows in three shards, whose last pieces are not whole."""
    CacheWriter(build_data(config(folder, choose(sites))), str(folder), 1300, shard_tokens=500).build()
    return f"data.path={folder}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    return harvest(tmp_path_factory.mktemp("cache") / "whole", [A, B, C, D])


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_subset_equals_a_cache_of_these_sites(whole, tmp_path, subset):
    only = harvest(tmp_path / "only", SUBSETS[subset])
    of_whole, of_only = (
        build_data(config(tmp_path, "data=cached", path, choose(SUBSETS[subset]))) for path in (whole, only)
    )
    assert of_whole.n_sources == len(SUBSETS[subset])
    for theirs, ours in zip(of_only.train_dataloader(), of_whole.train_dataloader(), strict=True):
        assert equal(theirs, ours)
        assert ours.is_contiguous()
    assert equal(of_only.validation_batches, of_whole.validation_batches)


def test_a_run_on_a_subset_ends_with_the_same_bits(whole, tmp_path):
    only = harvest(tmp_path / "only", [D, A])
    for name, path in {"only": only, "whole": whole}.items():
        train_run(config(tmp_path / name, "data=cached", path, choose([D, A])))
    for file in ("metrics.json", "sae/sae.safetensors"):
        assert (tmp_path / "only" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_a_sweep_over_subsets_reads_the_cache_once(whole, tmp_path):
    sites = {"one": choose([B]), "turned": choose([D, A]), "missing": "lm.sites=[transformer.h.4]"}
    train_jobs([read_job(config(tmp_path / name, "data=cached", whole, own)) for name, own in sites.items()])
    assert "not [transformer.h.4]: choose lm.sites among these" in read_status(tmp_path / "missing")[1]
    for name in ("one", "turned"):
        train_run(config(tmp_path / "alone" / name, "data=cached", whole, sites[name]))
        assert_same_run(tmp_path / "alone" / name, tmp_path / name)


def test_a_site_that_is_not_there_is_refused(whole, tmp_path):
    with pytest.raises(
        UserError, match=r"not \[transformer.h.5\]: choose lm.sites among these, or harvest into another"
    ):
        build_data(config(tmp_path, "data=cached", whole, choose([A, "transformer.h.5"])))


def test_a_cache_whose_rows_depend_on_all_its_sites_serves_all_of_them(tmp_path):
    """And a sweep over sites has a pass for each, as their rows differ."""
    long = "data.max_norm=1.5"
    CacheWriter(build_data(config(tmp_path, choose([A, B]), long)), str(tmp_path / "c"), 500, shard_tokens=500).build()
    cached = ["data=cached", f"data.path={tmp_path / 'c'}", long, "n_tokens=384"]
    assert build_data(config(tmp_path, *cached, choose([B, A]))).n_sources == 2
    with pytest.raises(UserError, match=r"leaves out rows by their norms at .*: read all of these sites"):
        build_data(config(tmp_path, *cached, choose([A])))
    data = build_data(config(tmp_path, choose([A]), long))
    assert data.shares_rows_with(data.with_sites([A]))
    assert not data.shares_rows_with(data.with_sites([B]))


def test_columns_of_a_cache_are_compared_with_the_model(whole, tmp_path, monkeypatch):
    """Columns in another order are noticed, because the first rows are computed again."""
    monkeypatch.setattr("sae_lab.cache.data.CachedData._columns", [0])
    with pytest.raises(UserError, match="does not compute"):
        build_data(config(tmp_path, "data=cached", whole, choose([D])))
