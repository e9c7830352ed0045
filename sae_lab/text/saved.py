"""Folders written by `save_to_disk` of `datasets`: which they are, and their rows, memory-mapped where they lie."""

from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.runtime.hub import hub_errors
from sae_lab.text.columns import Column, escaped


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


def saved_folders(globs: Sequence[str]) -> list[Path]:
    """Return the folders written by save_to_disk that the globs match, each that of a Dataset.

    Raises:
        SettingError: the globs match other files too.
    """
    found = sorted({Path(f) for g in globs for f in glob(str(Path(g).expanduser()), recursive=True)})  # noqa: PTH207
    folders = [f for f in found if is_saved(f)]
    files = [f for f in found if f.is_file() and not set(folders) & set(f.parents)]
    if folders and files:
        raise SettingError(
            f"{{paths}}={escaped([*globs])} match a folder of save_to_disk and {escaped(files[0].name)}: "
            "all files must be of one type."
        )
    return [with_split(f) for f in folders if not set(folders) & set(f.parents)]


def load_saved(folders: Sequence[Path]) -> list[Any]:
    """Return the rows of each folder; raise a UserError if one is damaged."""
    import datasets

    with hub_errors(f"{[str(f) for f in folders]} cannot be read as written by save_to_disk: {{reason}}"):
        return [datasets.load_from_disk(str(folder)) for folder in folders]


def joined(parts: Sequence[Any], columns: Sequence[Column]) -> Any:
    """Return the wanted columns of all parts, one after another; the parts may differ in other columns.

    Raises:
        UserError: a part has not these columns, or of other types.
    """
    import datasets

    names = list(dict.fromkeys(str(column.steps[0]) for column in columns))
    wanted = parts[0].select_columns(names).features
    if any({name: part.features.get(name) for name in names} != wanted for part in parts):
        raise UserError(f"the columns {names} of the folders of data.paths differ: give folders of the same columns.")
    return datasets.concatenate_datasets([part.select_columns(names) for part in parts])
