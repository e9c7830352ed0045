"""What a run leaves on disk: its folder, config, checkpoints, provenance, results, exports."""
