"""Settings that no SAE can have: one sentence from the constructor, not a training that means something else."""

import pytest
from conftest import SAE_NAMES, build

from sae_lab import saes
from sae_lab.runtime.checks import show
from sae_lab.runtime.errors import UserError
from sae_lab.saes import TopKSAE

SAES = [sae for sae in map(build, SAE_NAMES) if type(sae).__name__ in saes.__all__]  # an SAE of a user's is their own
COUNTS = {"dead_after": 1, "k_aux": 1, "k_warmup": 0, "sparsity_warmup": 0, "resample_every": 0, "seed": 0}
COUNTS |= {"n_inputs": 0, "anneal_start": 0, "anneal_end": 1}
WEIGHTS = ("auxk_coefficient", "l1_coefficient", "sparsity_coefficient", "theta")
WEIGHTS += ("frequency_coefficient", "preact_coefficient", "temporal_coefficient")
FLAGS = ("encoder_bias", "tied", "frozen_decoder", "unit_norm", "include_bias_level", "skip", "signed", "calibrated")
BETWEEN = "must lie between 1 and"
BAD = [
    *(
        (name, value, "a whole number of at least")
        for name, least in COUNTS.items()
        for value in (least - 1, 2.5, "abc")
    ),
    *((name, value, "a number of at least 0") for name in WEIGHTS for value in (-1, "abc", True)),
    *((name, value, "must be true or false") for name in FLAGS for value in ("maybe", 1, None)),
    *((name, value, "a number above 0") for name in ("bandwidth", "frequency_scale") for value in (0, "abc")),
    *(("encoder_norm", value, "a number above 0, drawn or unit") for value in (0, -1, "abc", True, None)),
    *(("budgets", value, "null, all, or a list of whole numbers") for value in (0, "some", [0], True)),
    *(("p_end", value, "a number above 0 and at most 1") for value in (0, 2, "abc")),
    *(("b_enc_init", value, "a number above 0 and below 1 or zeros") for value in (0, 1, -1, "abc", True, None)),
    *(("b_dec_init", value, "zeros, mean or geometric_median") for value in (0, "median", True, None)),
    *(("quantile_rate", value, "a number above 0 and at most 1") for value in (0, 2, "abc")),
    *(("k", value, "number") for value in ("abc", [1], True)),
    *(("k_start", value, sentence) for value, sentence in {"abc": "a number", 0: BETWEEN}.items()),
    *(("group_sizes", value, "a list of whole numbers of at least 1") for value in ("abc", 64, [32.5, 31.5])),
    *(("active_groups", value, "a whole number of at least 1") for value in ("abc", 0)),
    ("active_groups", 99, BETWEEN),
]


@pytest.mark.parametrize(("setting", "value", "sentence"), BAD)
def test_a_setting_that_cannot_be_is_told_by_name(setting, value, sentence):
    takers = [sae for sae in SAES if setting in sae.arguments()]
    assert takers
    for sae in takers:
        with pytest.raises(UserError) as caught:
            type(sae)(**sae.config | {setting: value})
        assert f"{setting}={show(value)} " in str(caught.value)
        assert sentence in str(caught.value)


def test_every_number_and_flag_of_an_sae_is_in_the_table():
    """A setting that is added is to be checked, and added here."""
    settings = {name for sae in SAES for name, value in sae.config.items() if not isinstance(value, str | dict)}
    assert settings - {name for name, *_ in BAD} == {"d_in", "n_latents", "n_sources", "hidden"}  # train's; test_mlp.py


def test_a_whole_number_may_be_written_as_a_float():
    sae = TopKSAE(k=4, d_in=16, n_latents=64, k_aux=1e1, dead_after=2.0)
    assert (repr(sae.k_aux), repr(sae.dead_after)) == ("10", "2")
