import pytest
import torch
import torch.nn.functional as F

from sae_lab.ops.matmul import ensure_dense, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "f"), [(33, 17), (1, 1), (0, 5), (5, 0)])
def test_linear_is_torchs_whatever_the_strides(n, f, bias, dtype):
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((n, 9), (9, f)))
    inputs = [x.requires_grad_(), W.requires_grad_(), torch.randn(f, dtype=dtype).requires_grad_() if bias else None]
    leaves = [t for t in inputs if t is not None]
    weights = torch.randn(n, f, generator=generator, dtype=dtype)
    results = []
    for function in (linear, F.linear):
        y = function(inputs[0], inputs[1].T, inputs[2])
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaves)])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


def test_under_autocast_it_is_bf16():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.ones(2, 3), torch.ones(4, 3)).dtype == torch.bfloat16


def test_columns_of_another_matrix_are_copied_and_nothing_else_is():
    x = torch.randn(8, 6)
    for dense in (x, x.T, x[2:5]):
        assert ensure_dense(dense) is dense
    assert ensure_dense(x[:, :3]).is_contiguous()
    assert torch.equal(ensure_dense(x[:, :3]), x[:, :3])
