"""Loss terms as pure functions. Means run over rows, sources and dimensions alike, unless a name says otherwise."""

from jaxtyping import Float
from torch import Tensor

from sae_lab.ops.sparse import Code, SparseCode


def mse(target: Float[Tensor, "b s d"], x_hat: Float[Tensor, "b s d"]) -> Tensor:
    """mean_{b,s,d} (target - x_hat)^2, in float32 whatever the compute precision."""
    return (target - x_hat).float().square().mean()


def l1(code: Code) -> Tensor:
    """mean_b sum_f |z|."""
    if isinstance(code, SparseCode):
        return code.values.float().abs().sum() / code.shape[0]
    return code.float().abs().sum(dim=-1).mean()
