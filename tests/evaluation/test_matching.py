"""Which latents two dictionaries share."""

import pytest
import torch
from conftest import build

from sae_lab.evaluation.matching import agreement, compare_all, compare_dictionaries, match
from sae_lab.runtime.errors import UserError


def with_rows(rows: torch.Tensor, **of_sae):
    settings = [f"sae.{key}={value}" for key, value in of_sae.items()]
    sae = build("topk", "k=1", *settings, d_in=rows.shape[1], n_latents=len(rows))
    sae.W_dec.data = rows[:, None]
    return sae


def test_shared_latents_are_found_wherever_they_stand():
    eye = torch.eye(4)
    other = torch.stack([eye[2], eye[0] + 0.5 * eye[3], -eye[1], eye[3] - eye[1]])
    found = compare_dictionaries(with_rows(eye), with_rows(other))
    partners = found.latents[found.latents["sae"] == "a"].set_index("latent")
    assert partners["partner"].tolist()[:1] + partners["partner"].tolist()[2:] == [1, 0, 3]
    assert partners["cosine"].tolist()[2:] == pytest.approx([1, 2**-0.5])
    numbers = found.numbers
    assert (numbers["n_shared"], numbers["n_own.a"], numbers["n_own.b"]) == (3, 1, 1)
    assert (numbers["matched_above_0.7"], numbers["matched_above_0.9"]) == (0.75, 0.25)
    cosine = 1.25**-0.5
    assert numbers["mean_max_cosine.a"] == pytest.approx((cosine + 0 + 1 + 2**-0.5) / 4)
    assert numbers["mean_max_cosine.b"] == pytest.approx((1 + cosine + 0 + 2**-0.5) / 4)


def test_signs_mean_nothing_where_codes_are_signed():
    eye = torch.eye(3)
    assert compare_dictionaries(with_rows(eye), with_rows(-eye)).numbers["n_shared"] == 0
    signed = compare_dictionaries(with_rows(eye, signed="true"), with_rows(-eye, signed="true"))
    assert signed.numbers["n_shared"] == 3


def test_all_pairs_are_compared_and_sizes_may_differ():
    saes = {"a": with_rows(torch.eye(4)), "b": with_rows(torch.eye(4)[:2]), "c": with_rows(-torch.eye(4))}
    found = compare_all(saes)
    assert [*found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found["a", "b"].numbers["matched_above_0.9"] == 1
    assert agreement(found)["matched_above_0.9"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="a has 4 and b has 6 numbers"):
        compare_dictionaries(with_rows(torch.eye(4)), with_rows(torch.eye(6)))


def test_large_dictionaries_match_mutual_nearest_neighbours():
    rows, columns = match(torch.tensor([[0.9, 0.8], [0.7, 0.1], [0.0, 0.85]]), "mutual_nearest")
    assert (rows.tolist(), columns.tolist()) == ([0, 2], [0, 1])
