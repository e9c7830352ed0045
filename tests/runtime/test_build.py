"""Objects from a config: what is wrong with them is told by the keys that the user types."""

import pickle

import pytest
import torch
from conftest import compose
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from sae_lab.runtime.build import build, typed_keys
from sae_lab.runtime.errors import SettingError, UserError, report_typed_keys, settings_under
from sae_lab.saes import BaseSAE

SIZES = {"d_in": 16, "n_latents": 64, "n_sources": 2}


def sentence(*overrides: str) -> str:
    """What is said of the SAE of a config that cannot be."""
    with pytest.raises(SettingError) as e:
        build(compose(*overrides), "sae", **SIZES)
    return str(e.value).partition(" ")[0]


def test_what_a_node_describes_is_built():
    assert isinstance(build(compose("sae=route", "k=4"), "sae", **SIZES), BaseSAE)
    adam = build(compose("optimizer.lr=1e-3"), "optimizer")([torch.nn.Parameter(torch.zeros(2))])
    assert isinstance(adam, torch.optim.Adam)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["k=0"], "k=0"),
        (["sae.k=0"], "sae.k=0"),
        (["sae=route", "k=0"], "k=0"),
        (["sae=route", "sae.inner.k=0"], "sae.inner.k=0"),
        (["sae=route", "seed=-1"], "seed=-1"),
        (["sae=route", "sae.inner.dead_after=0"], "sae.inner.dead_after=0"),
        (["sae.dead_after=0"], "sae.dead_after=0"),
    ],
)
def test_a_key_is_the_one_that_is_typed(overrides, key):
    assert sentence(*overrides) == key


def test_a_partial_tells_its_errors_by_the_same_keys():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(SettingError, match=r"^optimizer\.bogus is not a setting of Adam \(optimizer\._target_\): "):
        build(compose("+optimizer.bogus=1"), "optimizer")(parameters)
    with pytest.raises(UserError, match=r"^optimizer cannot be built: Invalid learning rate: -1"):
        build(compose("optimizer.lr=-1"), "optimizer")(parameters)
    with pytest.raises(SettingError, match=r"^schedule\.warmup=2 must be a share"):
        build(compose("schedule.warmup=2"), "schedule")(0, n_steps=10)


def test_a_target_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"^sae\._target_=nope\.Nope cannot be imported: correct that name\.$"):
        build(compose("sae._target_=nope.Nope"), "sae")


def test_the_causes_of_a_mistake_end():
    with pytest.raises(SettingError) as e:
        build(compose("sae.dead_after=0"), "sae", **SIZES)
    assert e.value.__cause__ is None


def test_another_failure_keeps_its_traceback():
    with pytest.raises(InstantiationException, match="ZeroDivisionError"):
        build(OmegaConf.create({"node": {"_target_": "operator.floordiv", "_args_": [1, 0]}}), "node")


def test_only_a_whole_interpolation_of_a_key_is_that_key():
    cfg = OmegaConf.create(
        {"k": 1, "a": {"b": "${k}", "c": "x${k}", "d": "${oc.env:HOME}", "e": ["${k}"]}, "f": "${a.b}"}
    )
    assert typed_keys(cfg) == {"a.b": "k", "f": "a.b"}


def test_a_setting_error_names_arguments_keys_and_what_is_typed():
    def fail() -> None:
        with settings_under("inner"):
            raise SettingError("{k}=0 with {routing}=hard: {braces that} are no name.")

    with pytest.raises(SettingError, match=r"^inner\.k=0 with inner\.routing=hard: {braces that} are no name\.$"):
        fail()
    with (
        pytest.raises(SettingError, match=r"^n=0 with sae\.inner\.routing=hard") as e,
        report_typed_keys({"sae.inner.k": "n"}),
        settings_under("sae"),
    ):
        fail()
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)
