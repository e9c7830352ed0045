"""Learning-rate schedules: step -> factor."""


def warmup_decay(step: int, n_steps: int, warmup: float, decay: float) -> float:
    """min((step + 1) / (warmup · n_steps), 1, (n_steps - step) / (decay · n_steps)): a trapezoid; 0 is no ramp."""
    up = (step + 1) / (warmup * n_steps) if warmup else 1.0
    down = (n_steps - step) / (decay * n_steps) if decay else 1.0
    return max(0.0, min(1.0, up, down))
