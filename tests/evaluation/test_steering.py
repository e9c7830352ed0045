"""What an edit of one latent does, and the units of its strength."""

import pytest
import torch

from sae_lab.evaluation.steering import check_choice, edit_latent, unit_of_strength
from sae_lab.runtime.errors import UserError

CODE = torch.tensor([[1.0, 2.0, 0.0], [0.0, 3.0, 4.0]])


@pytest.mark.parametrize(("mode", "column"), [("add", [7.0, 8.0]), ("clamp", [5.0, 5.0]), ("ablate", [0.0, 0.0])])
def test_only_the_latent_changes(mode, column):
    edited = edit_latent(1, mode, 5.0)(CODE)
    assert edited[:, 1].tolist() == column
    assert torch.equal(edited[:, [0, 2]], CODE[:, [0, 2]])
    assert CODE[0, 1] == 2


def test_a_strength_of_one_is_the_largest_activation_or_the_mean_norm():
    measured = {"max": 4.0, "density": 0.5, "norm": 6.0, "effect": 2.0, "others": [3, 5]}
    assert [unit_of_strength(unit, measured, 0) for unit in ("max", "norm", "code")] == [4.0, 3.0, 1.0]
    with pytest.raises(UserError, match=r"latent=7 is not .* is \(latent=3 or latent=5\), give unit"):
        unit_of_strength("max", measured | {"max": 0.0}, 7)
    with pytest.raises(UserError, match="unit=half is not known: choose max, norm or code"):
        check_choice("add", "half")
