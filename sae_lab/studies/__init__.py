"""Controlled measurements: what a step costs, which stage limits, whether planted features are found."""
