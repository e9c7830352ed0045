"""Codes split by the ranks of their entries, for losses at several numbers of active latents."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_lab.ops.sparse import SparseCode
from sae_lab.parallel.mesh import latent_axis
from sae_lab.parallel.shards import concatenate_shards, max_over_shards


def split_by_rank(code: SparseCode, starts: Int[Tensor, " n"]) -> SparseCode:
    """Split each row into n rows by the ranks of its entries; the largest has rank 0, ties rank the first latent first.

    Entries of sharded latents have their ranks among those of all shards, and each rank splits its own.

    Row r·n + i of the result has the entries of row r with ranks starts_i ... starts_{i+1} - 1, the last one all from
    starts_{n-1} on. Its latents are in the order of their ranks.

    Args:
        code: of at least one row. In a padded code, no row has more than its share of the places, nnz / b.
        starts: ascending, from 0.
    """
    pattern, b = code.pattern, code.shape[0]
    offsets, rows = pattern.row_offsets, pattern.rows
    width = len(rows) // b if pattern.padded else int(max_over_shards(offsets.diff().max()))
    places = torch.arange(len(rows), device=rows.device)
    cells = (rows * width + places - offsets[rows]).clamp_max(b * width)  # padding shares a cell that is cut off
    sizes = code.values.detach().abs()
    table = sizes.new_full((b * width + 1,), -1.0).scatter(0, cells, sizes)[:-1].view(b, width)
    order = F.pad(table.sort(dim=1, descending=True, stable=True).indices.flatten(), (0, 1))
    ranked = offsets[rows] + order[cells]
    if pattern.padded:
        ranked = torch.where(places < offsets[-1], ranked, places)
    begins = (offsets[:-1, None] + number_of_smaller_rank(table, starts)).flatten()
    split = replace(pattern, row_offsets=torch.cat([begins, offsets[-1:]]), latents=pattern.latents[ranked])
    return SparseCode(split, code.values.gather(0, ranked))


def number_of_smaller_rank(sizes: Float[Tensor, "b k"], starts: Int[Tensor, " n"]) -> Int[Tensor, "b n"]:
    """Return how many of the entries of each row have a rank among all shards that is smaller than each start.

    Args:
        sizes: of the entries in the order of their latents; -1 where a row has fewer than k.
    """
    if latent_axis().size == 1:
        return torch.minimum((sizes >= 0).sum(dim=1, keepdim=True), starts)
    order = concatenate_shards(sizes, dim=1).sort(dim=1, descending=True, stable=True).indices
    ranks = order.argsort(dim=1).chunk(latent_axis().size, dim=1)[latent_axis().index]
    return ((ranks.unsqueeze(2) < starts) & (sizes >= 0).unsqueeze(2)).sum(dim=1)
