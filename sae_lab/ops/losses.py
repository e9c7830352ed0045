"""Loss terms as pure functions."""

from jaxtyping import Float
from torch import Tensor

from sae_lab.ops.sparse import Code, SparseCode


def mse(target: Float[Tensor, "b s d"], x_hat: Float[Tensor, "b s d"]) -> Tensor:
    """Return mean_{b,s,d} (target - x_hat)², computed in float32 at any precision."""
    return (target - x_hat).float().square().mean()


def l1(code: Code) -> Tensor:
    """Return mean_b sum_f |z|, computed in float32 at any precision."""
    if isinstance(code, SparseCode):
        return code.values.float().abs().sum() / code.shape[0]
    return code.float().abs().sum(dim=-1).mean()
