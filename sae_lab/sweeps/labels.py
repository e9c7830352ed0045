"""What a report shows of jobs and settings: no secrets, no values of the environment, no folders of this machine."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lab.cli.folder_names import split_overrides
from sae_lab.runs.config import read_config, read_environment_keys
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.private import private_values, public_text

FOLDERS = re.compile(r"(?<=[=\[,:'\" ])(?:~|\.\.)?_[^\],'\"}]*_(?=[^_\],'\"}])")
"""The folders of a path in the name of a job folder, where slashes are underscores: `data.paths=[_home_me_a.txt]`."""


def label_settings(values: Sequence[Any], shown: Sequence[Any]) -> list[Any]:
    """Return what a column of a table shows: `shown` in place of `values`.

    Values that differ keep different labels. Otherwise jobs that read /a/x.txt and /b/x.txt would count as repeats of
    one another: they show `x.txt #1` and `x.txt #2`.
    """
    sharing: dict[Any, dict[Any, int]] = defaultdict(dict)
    for value, label in zip(values, shown, strict=True):
        sharing[label].setdefault(value, len(sharing[label]) + 1)
    return [
        f"{label} #{sharing[label][value]}" if isinstance(label, str) and len(sharing[label]) > 1 else label
        for value, label in zip(values, shown, strict=True)
    ]


def label_jobs(names: Sequence[str]) -> list[str]:
    """Return what a report shows of the names of jobs, which are made of their overrides."""
    shown = [",".join(FOLDERS.sub("", public_text(part)) for part in split_overrides(name)) for name in names]
    return label_settings(names, shown)


def hide_values(folder: Path, text: str) -> str:
    """Return a sentence about a job without what is private in it."""
    try:
        keys = read_environment_keys(folder)
        values = private_values(read_config(folder), keys) if keys else []
    except (UserError, OSError, ValueError):  # the job is damaged: the sentence is about that
        values = []
    return public_text(text, values)
