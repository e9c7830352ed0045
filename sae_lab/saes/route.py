"""RouteSAE: a learned router chooses, for each token, the site whose activation is worth explaining."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lab.ops.matmul import linear
from sae_lab.ops.sparse import Code
from sae_lab.parallel.collectives import mean_over_ranks
from sae_lab.runtime.errors import SettingError, settings_under
from sae_lab.runtime.seeds import nth_generator
from sae_lab.saes.base import BaseSAE, Edit, SAEOutput
from sae_lab.saes.parts.normalize import Context, Normalization
from sae_lab.saes.parts.sources import Sources


class RouteSAE(BaseSAE):
    """r = softmax(W_router · aggre_s x_s),   l = argmax r,   row = r_l x_l  (hard)  or  sum_s r_s x_s  (soft)

    x is the normalised input, and `inner`, any SAE of one source, explains the row: one dictionary for all sites.
    `soft` mixes only in a training forward pass; from then on the likeliest site stands alone: row = x_l.

    For evaluation and splicing, x_hat is the inner SAE's reconstruction at site l of each token, divided by the r_l
    that the row was multiplied with (the authors' hooks leave r_l out in both places, so that what they deploy is not
    what they trained). At the other sites `reconstruct` gives x back and `covers` is False: metrics leave them out,
    and a splice leaves them to the language model. `decode` does not know the site: it gives the row at each of them.

    The loss is the inner SAE's over the mean square of the batch's rows, or the router would lower it by lowering r
    alone. The authors' code takes that ratio row by row; there r_l cancels, and only biases would teach a hard router.
    Over the batch, r_l rises where the error is below the average and falls elsewhere. (Planted features on one of
    three sites, noise on the others, which site decided by the features: after 1,500 steps a hard router is right on
    90 % of the rows, with the ratio by row on 17 %, with none on 67 % and r is 1/3; a soft one on 90 % with either.)

    Shi et al. 2025, arXiv 2503.08200.

    Args:
        inner: builds the inner SAE from d_in, n_latents and n_sources, such as `partial(TopKSAE, k=16,
            normalize="none")`; or its description {"class", "config"}, as in config.json.
        aggre: `sum` or `mean` over the sites; to the router the difference is a temperature of s.
        routing: `hard` or `soft`.
        seed: of the router's initial weights; the inner SAE has its own.
        normalize: `per_token`, `none`, `constant_norm` or `mean_norm`, each site by itself, before the router (see
            parts/normalize.py).

    Raises:
        UserError: an unknown word, or an inner SAE that normalises: it would undo the router's weight.
    """

    AGGREGATES: Mapping[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda x: x.sum(dim=1),
        "mean": lambda x: x.mean(dim=1),
    }

    def __init__(
        self,
        inner: Callable[..., BaseSAE] | Mapping[str, Any],
        d_in: Annotated[int, Ge(1)],
        n_latents: Annotated[int, Ge(1)],
        n_sources: Annotated[int, Ge(1)] = 1,
        aggre: Literal["sum", "mean"] = "sum",
        routing: Literal["hard", "soft"] = "hard",
        seed: Annotated[int, Ge(0)] = 0,
        normalize: Normalization = "per_token",
    ):
        super().__init__()
        self.d_in, self.n_latents, self.n_sources = d_in, n_latents, n_sources
        self.aggre, self.routing, self.seed, self.normalize = aggre, routing, seed, normalize
        self.sources = Sources(n_sources, normalize=normalize)
        if isinstance(inner, Mapping):
            self.inner = BaseSAE.from_config(inner["class"], inner["config"])
        else:
            with settings_under("inner"):
                self.inner = inner(d_in=d_in, n_latents=n_latents, n_sources=1)
        if self.inner.config.get("normalize", "none") != "none":
            raise SettingError("the router's rows are normalised already: give {inner}.normalize=none.")
        self.batch_rule = self.inner.batch_rule
        generator = nth_generator(seed, 1)  # not the inner SAE's numbers
        bound = d_in**-0.5
        self.W_router = nn.Parameter(torch.empty(n_sources, d_in).uniform_(-bound, bound, generator=generator))

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"inner": {"class": type(self.inner).__name__, "config": self.inner.config}}

    def probabilities(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s"]:
        """r, from normalised rows."""
        return linear(self.AGGREGATES[self.aggre](x), self.W_router).float().softmax(dim=-1)

    def site_weights(self, r: Float[Tensor, "b s"]) -> Float[Tensor, "b s"]:
        """What the rows of the sites are weighted with: zero but at the likeliest site."""
        chosen = argmax_mask(r)
        return r * chosen if self.routing == "hard" else chosen.to(r)

    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        """`target` and `x_hat` are (b, 1, d): the row, and what the inner SAE makes of it."""
        raw = self.as_rows(x)
        if self.training:
            self.sources.observe(raw)
        rows, _ = self.sources.read(raw)
        r = self.probabilities(rows)
        return self.inner(weighted_sum(rows, r if self.training and self.routing == "soft" else self.site_weights(r)))

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        mean_square = mean_over_ranks(out.target.float().square().mean())
        return {name: mean_over_ranks(term) / mean_square for name, term in self.inner.losses(out).items()}

    def route(self, x: Tensor) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b s"], Context]:
        """Raw activations -> the row that is deployed, the weights of the sites in it, and what undoes normalising."""
        rows, context = self.sources.read(self.as_rows(x))
        weights = self.site_weights(self.probabilities(rows))
        return weighted_sum(rows, weights), weights, context

    def encode(self, x: Tensor) -> Float[Tensor, "b f"]:
        return self.inner.encode(self.route(x)[0])

    def decode(self, code: Code) -> Float[Tensor, "b s d"]:
        return self.inner.decode(code).expand(-1, self.n_sources, -1)

    def autoencode(self, x: Tensor, edit: Edit | None = None) -> tuple[Tensor, Code]:
        row, weights, context = self.route(x)
        row_hat, code = self.inner.autoencode(row, edit)
        x_hat = self.sources.undo(row_hat / weights.sum(dim=-1).view(-1, 1, 1), context)
        return torch.where(weights.unsqueeze(-1) > 0, x_hat.to(x.dtype), self.as_rows(x).to(x.dtype)).view_as(x), code

    def directions(self) -> Float[Tensor, "f s d"]:
        return self.inner.directions().expand(-1, self.n_sources, -1)

    def predicted_mask(self, x: Tensor) -> Bool[Tensor, "b s"]:
        return self.route(x)[1] > 0

    @torch.no_grad()
    def resample(self, x: Float[Tensor, "b s d"]) -> list[tuple[nn.Parameter, Int[Tensor, " rows"]]]:
        self.sources.observe(self.as_rows(x))  # routing the first batch takes its scale
        return self.inner.resample(self.route(x)[0])

    def before_step(self) -> None:
        self.inner.before_step()

    def after_step(self) -> None:
        self.inner.after_step()

    def calibrate(self, x: Float[Tensor, "b s d"], i: int) -> None:
        with torch.no_grad():
            self.inner.calibrate(self.route(x)[0], i)

    def dead(self) -> Bool[Tensor, " f"] | None:
        return self.inner.dead()


def argmax_mask(r: Float[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
    """True at the largest entry of each row; of equal ones at the first."""
    return torch.zeros_like(r, dtype=torch.bool).scatter(-1, r.argmax(dim=-1, keepdim=True), True)


def weighted_sum(x: Float[Tensor, "b s d"], weights: Float[Tensor, "b s"]) -> Float[Tensor, "b 1 d"]:
    """sum_s weights_s x_s."""
    return (weights.to(x).unsqueeze(-1) * x).sum(dim=1, keepdim=True)
