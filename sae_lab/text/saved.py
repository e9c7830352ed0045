"""Folders written by `save_to_disk` of `datasets`: which they are, and their rows, memory-mapped where they lie."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.runtime.hub import hub_errors


def is_saved(folder: Path) -> bool:
    """Whether the folder was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (folder / "state.json").is_file() or is_saved_dict(folder)


def is_saved_dict(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file()


def with_split(folder: Path) -> Path:
    """Return the folder of a Dataset: the folder itself; of a DatasetDict its split `train`, or its only split.

    Raises:
        SettingError: a DatasetDict has several splits, and none is called train.
    """
    if not is_saved_dict(folder):
        return folder
    splits = sorted(f.name for f in folder.iterdir() if is_saved(f))
    if "train" not in splits and len(splits) != 1:
        example = f", such as {{paths}}=[{folder / splits[0]}]" if splits else ""
        raise SettingError(f"{folder} has the splits {splits} and none called train: give the folder of one{example}.")
    return folder / ("train" if "train" in splits else splits[0])


def load_saved(folders: Sequence[Path]) -> Any:
    """Return the rows of the folders, one after another.

    Raises:
        UserError: a folder is damaged, or the folders have different columns.
    """
    import datasets

    with hub_errors(f"{[str(f) for f in folders]} cannot be read as written by save_to_disk: {{reason}}"):
        parts = [datasets.load_from_disk(str(folder)) for folder in folders]
        if len({str(part.features) for part in parts}) > 1:
            raise UserError(f"the columns of {[str(f) for f in folders]} differ: give folders of the same columns.")
        return datasets.concatenate_datasets(parts)
