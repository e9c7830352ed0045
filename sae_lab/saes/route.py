"""RouteSAE: for each token, a learned router chooses the site to explain."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lab.ops.losses import at_least_float32
from sae_lab.ops.matmul import linear
from sae_lab.ops.sparse import Code
from sae_lab.parallel.collectives import mean_over_ranks
from sae_lab.runtime.errors import SettingError
from sae_lab.runtime.seeds import nth_generator
from sae_lab.saes.base import BaseSAE, Edit, SAEOutput
from sae_lab.saes.composed import ComposedSAE
from sae_lab.saes.parts.normalize import Context, Normalization
from sae_lab.saes.parts.sources import Sources


class RouteSAE(ComposedSAE):
    """RouteSAE: for each token, a router chooses the site to explain, and an inner SAE explains it.

        r   = softmax(W_router · aggre_s x_s),   l = argmax r
        row = r_l x_l (hard)   or   sum_s r_s x_s (soft)

    x is the normalized input. `inner`, any SAE of one source, explains the row, so one dictionary serves all sites.
    `soft` mixes the sites in training forward passes only; elsewhere row = x_l, the activation at the likeliest site.

    For evaluation and splicing, x_hat at site l is the inner SAE's reconstruction divided by r_l, by which the row was
    multiplied. (The authors' hooks leave r_l out in both places, so they deploy another SAE than they trained.) At the
    other sites `reconstruct` returns x and `predicted_mask` is False: metrics ignore them, and a splice does not
    replace them. `decode(code)` does not know the site, so it returns the row at every site; `decode(code, x)` does.

    The loss is that of the inner SAE, divided by the mean square of the batch's rows. Otherwise the router would lower
    the loss just by lowering r. The authors' code divides each row's loss by that row's mean square. Then r_l cancels,
    and a hard router could learn from biases only. With the mean over the batch, r_l rises where the error is below
    average and falls elsewhere. Measured with planted features on one of three sites, which the features determine, and
    noise on the others: after 1,500 steps a hard router is right on 90 % of the rows, 17 % if divided row by row, and
    67 %, with r = 1/3, if not divided at all. A soft router is right on 90 % either way.

    Shi et al. 2025, arXiv 2503.08200.

    Args:
        inner: a function that builds the inner SAE from d_in, n_latents and n_sources, such as `partial(TopKSAE, k=16,
            normalize="none")`; or its description {"class", "config"}, as in config.json.
        aggre: `sum` or `mean` over the sites. For the router the difference is a temperature of s.
        routing: `hard` or `soft`.
        seed: seed of the router's initial weights; the inner SAE has its own.
        normalize: a key of NORMALIZERS (see parts/normalize.py). Applied to each site by itself, before the router.

    Raises:
        UserError: a setting is unknown, or the inner SAE normalizes, which would undo the router's weight.
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
        self.sources = Sources(d_in, n_sources, normalize=normalize)
        self.build_inner(inner)
        if self.inner.config.get("normalize", "none") != "none":
            raise SettingError("the rows of the inner SAE are normalized already: give {inner}.normalize=none.")
        if self.inner.reads_previous:
            raise SettingError(
                f"a {type(self.inner).__name__} compares rows with those before, which a route does not pass on: "
                "choose another {inner}."
            )
        generator = nth_generator(seed, 1)  # other random numbers than the inner SAE's
        bound = d_in**-0.5
        self.W_router = nn.Parameter(torch.empty(n_sources, d_in).uniform_(-bound, bound, generator=generator))

    def probabilities(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s"]:
        """Compute r from normalized rows."""
        return at_least_float32(linear(self.AGGREGATES[self.aggre](x), self.W_router)).softmax(dim=-1)

    def site_weights(self, r: Float[Tensor, "b s"]) -> Float[Tensor, "b s"]:
        """Return the deployed weight of each site: zero except at the likeliest one."""
        chosen = argmax_mask(r)
        return r * chosen if self.routing == "hard" else chosen.to(r)

    def forward(self, x: Float[Tensor, "b s d"]) -> SAEOutput:
        """Route, then encode and decode with the inner SAE. `target` (the row) and `x_hat` are (b, 1, d)."""
        return nn.Module.__call__(self.inner, self.row(self.as_rows(x)))

    def row(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b 1 d"]:
        """Return the row that the inner SAE gets in this mode."""
        if self.training:
            self.sources.observe(x)
        rows, _ = self.sources.read(x)
        r = self.probabilities(rows)
        return weighted_sum(rows, r if self.training and self.routing == "soft" else self.site_weights(r))

    @torch.no_grad()
    def start(self, x: Float[Tensor, "b s d"]) -> None:
        self.inner.start(self.row(self.as_rows(x)))

    def losses(self, out: SAEOutput) -> dict[str, Tensor]:
        mean_square = mean_over_ranks(at_least_float32(out.target).square().mean())
        mean_square = mean_square.clamp_min(1e-20)  # rows of zeros have loss 0
        return {name: mean_over_ranks(term) / mean_square for name, term in self.inner.losses(out).items()}

    def route(self, x: Tensor) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b s"], Context]:
        """Return the deployed row of raw activations, the weights of its sites, and the context of its normalizer."""
        rows, context = self.sources.read(self.as_rows(x))
        weights = self.site_weights(self.probabilities(rows))
        return weighted_sum(rows, weights), weights, context

    def encode(self, x: Tensor) -> Float[Tensor, "*b f"]:
        return self.inner.encode(self.route(x)[0]).view(*self.leading(x), self.n_latents)

    def decode_rows(self, code: Code) -> Float[Tensor, "b s d"]:
        """Map a code to x_hat at every site, since it does not tell the site: see `decode(code, x)`."""
        return self.sources.undo_shared(self.inner.decode(code).expand(-1, self.n_sources, -1))

    def autoencode(self, x: Tensor, edit: Edit | None = None) -> tuple[Tensor, Code]:
        row, weights, context = self.route(x)
        row_hat, code = self.inner.autoencode(row, edit)
        x_hat = self.sources.undo(row_hat / weights.sum(dim=-1).view(-1, 1, 1), context)
        return torch.where(weights.unsqueeze(-1) > 0, x_hat.to(x.dtype), self.as_rows(x).to(x.dtype)).view_as(x), code

    def directions(self) -> Float[Tensor, "f s d"]:
        return self.sources.unwhiten(self.inner.directions().expand(-1, self.n_sources, -1))

    def predicted_mask(self, x: Tensor) -> Bool[Tensor, "b s"]:
        return self.route(x)[1] > 0

    @torch.no_grad()
    def resample(self, x: Float[Tensor, "b s d"]) -> list[tuple[nn.Parameter, Int[Tensor, " rows"]]]:
        self.sources.observe(self.as_rows(x))  # routing needs the scale, which the first batch sets
        return self.inner.resample(self.route(x)[0]) if self.inner.may_resample() else []

    def calibrate(self, x: Float[Tensor, "b s d"], i: int) -> None:
        with torch.no_grad():
            self.inner.calibrate(self.route(x)[0], i)


def argmax_mask(r: Float[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
    """Return a mask of the largest entry of each row, the first one if several are equal."""
    return torch.zeros_like(r, dtype=torch.bool).scatter(-1, r.argmax(dim=-1, keepdim=True), True)


def weighted_sum(x: Float[Tensor, "b s d"], weights: Float[Tensor, "b s"]) -> Float[Tensor, "b 1 d"]:
    """Compute sum_s weights_s x_s."""
    return (weights.to(x).unsqueeze(-1) * x).sum(dim=1, keepdim=True)
