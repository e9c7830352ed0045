"""The training step, the Trainer and its callbacks, and one run from config to metrics."""
