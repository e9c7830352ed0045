"""A path that is not there is told with the one that was meant, and is not looked for on the hub."""

import pytest
from omegaconf import OmegaConf

from sae_lab import load_sae
from sae_lab.cli.replaced import sources_from
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.near_paths import is_path


@pytest.fixture(autouse=True)
def sweep(tmp_path, monkeypatch):
    """A sweep of two jobs and a run, in the working directory."""
    for folder in ("multirun/first/k=8,sae=topk", "multirun/first/k=8,sae=gated", "outputs/demo/sae", "mine/runs"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        ("outputs/dmeo", "did you mean outputs/demo?"),
        ("outputs/dmeo/sae", "did you mean outputs/demo/sae?"),
        ("multirun/first/k=8,sae=top", "did you mean multirun/first/k=8,sae=topk?"),
        ("multirun/first/0", "multirun/first has k=8,sae=gated, k=8,sae=topk."),
        ("mine/x", "mine has runs."),
        ("a/b/c", "give the folder of a run or of an SAE."),
        ("outputs/demo/sae/x", "give the folder of a run or of an SAE."),
    ],
)
def test_the_path_that_was_meant(source, advice):
    with pytest.raises(UserError) as e:
        load_sae(source)
    assert str(e.value) == f"there is no folder or file {source}: {advice}"


def test_sources_are_looked_for_before_one_is_loaded():
    with pytest.raises(UserError, match=r"there is no folder or file multirun/first/0"):
        sources_from(OmegaConf.create({"run_dir": ["outputs/demo", "multirun/first/0"], "sae_id": None, "names": None}))


def test_names_of_the_hub_are_no_paths():
    assert not any(map(is_path, ["gpt2", "EleutherAI/sae-llama-3.1-8b-32x", "google/gemma-scope-2b-pt-res"]))
    assert all(map(is_path, ["./gpt2", "~/gpt2", "a/b/c", "outputs/x", "runs/k=8"]))
