"""Tables of a run (metrics.csv and those in figures/), read for figures."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from sae_lab.runtime.os_errors import reason_of

log = logging.getLogger(__name__)


def read_numbers(file: Path, columns: list[str]) -> pd.DataFrame | None:
    """Read a table of a run; None if there is none or, with a warning, if it is damaged.

    Args:
        columns: those that must be there, full of numbers. [] for a log, in which all columns are numbers or blank.
    """
    try:
        if not file.is_file() or not file.stat().st_size:
            return None
        table = pd.read_csv(file)
        numbers = (table[columns] if columns else table).astype(float)
        if columns and not np.isfinite(numbers.to_numpy()).all():
            raise ValueError("a number is missing")
        return table
    except (OSError, ValueError, LookupError) as e:
        log.warning("%s is left out of the figures: %s", file, reason_of(e))
        return None
