"""SAE Lab's Hydra launchers. Hydra finds plug-ins in the namespace `hydra_plugins` and nowhere else."""
