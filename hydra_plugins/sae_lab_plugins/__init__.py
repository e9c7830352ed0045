"""SAE Lab's Hydra plug-ins. Hydra looks for plug-ins only in the namespace `hydra_plugins`."""
