"""The folder for files that any run of this user can use again and that can be made again: ~/.cache/sae_lab."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Return the folder; the environment variable SAE_LAB_CACHE names another one."""
    return Path(os.environ.get("SAE_LAB_CACHE") or "~/.cache/sae_lab").expanduser()
