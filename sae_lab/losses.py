"""Loss terms as pure functions. Means run over rows, sources and dimensions alike, unless a name says otherwise."""

from jaxtyping import Float
from torch import Tensor

from sae_lab.matmul import linear
from sae_lab.selection import kth_largest, sortable
from sae_lab.sparse import Code, SparseCode


def mse(target: Float[Tensor, "b s d"], x_hat: Float[Tensor, "b s d"]) -> Tensor:
    """mean_{b,s,d} (target - x_hat)^2, in float32 whatever the compute precision."""
    return (target - x_hat).float().square().mean()


def l1(code: Code) -> Tensor:
    """mean_b sum_f |z|."""
    if isinstance(code, SparseCode):
        return code.values.float().abs().sum() / code.shape[0]
    return code.float().abs().sum(dim=-1).mean()


def auxk(
    residual: Float[Tensor, "b s d"],
    dead_preactivation: Float[Tensor, "b n_dead"],
    dead_W_dec: Float[Tensor, "n_dead s d"],
    k_aux: int,
    over_batch: bool = False,
) -> Tensor:
    """mean (e - sum_{top k_aux dead i} relu(h_i) W_dec_i)^2: dead latents learn the residual e (Gao et al. 2024, §A.2).

    With `over_batch` the top k_aux · b of the whole batch take part instead of the top k_aux of each row.

    The residual carries no gradient (otherwise live latents are pulled towards the dead ones), and the sum has no
    bias: e already lacks b_dec. Latents that tie for the last place all take part.
    """
    h = dead_preactivation
    if h.shape[-1] > k_aux:
        order = sortable(h.detach())
        last = kth_largest(order.flatten(), k_aux * len(h)) if over_batch else kth_largest(order, k_aux).unsqueeze(-1)
        h = h.masked_fill(order < last, 0)
    return mse(residual.detach(), linear(h.relu(), dead_W_dec.flatten(1).T).view_as(residual))
