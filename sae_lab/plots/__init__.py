"""Figures. Each function takes a table and a path, writes a PNG to that path and returns the path."""

from sae_lab.plots.matching import matched_cosines
from sae_lab.plots.planted import recovery_by_frequency
from sae_lab.plots.run import activations, l0_per_token, latent_density, relative_norm, training_curves
from sae_lab.plots.style import display_name, has_values
from sae_lab.plots.sweep import by_job, frontier, l0_by_line, mean_over_seeds, metrics_against

__all__ = [
    "activations",
    "by_job",
    "display_name",
    "frontier",
    "has_values",
    "l0_by_line",
    "l0_per_token",
    "latent_density",
    "matched_cosines",
    "mean_over_seeds",
    "metrics_against",
    "recovery_by_frequency",
    "relative_norm",
    "training_curves",
]
