"""Loss terms against plain torch."""

import pytest
import torch

from sae_lab.ops.losses import mse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weight", [1.0, 0.3, 1 / 7, 2.0**16])
@pytest.mark.parametrize("rows", [5, 1], ids=["all rows", "one for all"])
def test_mse_has_the_bits_of_its_formula(dtype, weight, rows):
    target, x_hat = torch.randn(2, 5, 33).to(dtype).transpose(0, 1), torch.randn(rows, 2, 33).to(dtype)
    target = target if rows == 5 else target.contiguous()  # sums over rows run in the order of memory
    wide, results = torch.promote_types(dtype, torch.float32), []
    for form in (mse, lambda y, y_hat: (y.to(wide) - y_hat.to(wide)).square().mean()):
        leaves = target.clone().requires_grad_(), x_hat.clone().requires_grad_()
        loss = form(*leaves)
        (weight * loss).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(mine, plain) for mine, plain in zip(*results, strict=True))


def test_the_gradient_of_mse():
    x = torch.randn(3, 1, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(mse, (x.clone().requires_grad_(), (0.5 * x).requires_grad_()))
