"""Figures, from tables: each function takes a table and a path, draws, writes a PNG there and returns the path."""

from sae_lab.plots.run import l0_per_token, latent_density, relative_norm, training_curves
from sae_lab.plots.style import display_name, has_values
from sae_lab.plots.sweep import against, by_job, frontier, l0_by_line, mean_over_seeds

__all__ = [
    "against",
    "by_job",
    "display_name",
    "frontier",
    "has_values",
    "l0_by_line",
    "l0_per_token",
    "latent_density",
    "mean_over_seeds",
    "relative_norm",
    "training_curves",
]
