"""Finds the files of a language model: a local folder, the Hugging Face cache, or the hub."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sae_lab.runtime.errors import SettingError
from sae_lab.runtime.hub import HUB_TIMEOUT, hub_errors
from sae_lab.runtime.near_paths import is_path, meant

TINY = "tiny"
FINE_TUNED_TINY = "outputs/tiny_disassembly"  # default output folder of `python -m sae_lab.lm.tiny.fine_tune`
MODEL_FILES = ("config.json", "adapter_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
OTHER_FILES = {
    "*.gguf": "has weights of llama.cpp (GGUF): give the model that they were converted from",
    "model_index.json": "is a pipeline of diffusers, whose text encoder is not a causal language model: give one",
    "config_sentence_transformers.json": "is an encoder of sentence-transformers, which has no language-model head: "
    "give a causal language model",
}
"""A file by which a folder of another kind is known -> what the folder is, and what to give instead."""
Loaded = TypeVar("Loaded")


def read_local_first(
    name: str,
    revision: str | None,
    read: Callable[..., Loaded],
    key: str = "name",
    begins_with: Sequence[str] = MODEL_FILES,
) -> Loaded:
    """Return `read(source, revision=..., local_files_only=...)` of a local folder, the Hugging Face cache, or the hub.

    A model in the cache is used without asking the hub: `transformers` would ask for every optional file and, without
    a network, retry each for 23 seconds.

    Args:
        read: raises an OSError if a file is missing.
        key: the setting that has the value `name`. Errors name it.
        begins_with: files of which a local folder must have one.

    Raises:
        UserError: there is no such folder or model, the hub cannot be reached, or the files cannot be read.
    """
    files: dict[str, Any] = {"revision": revision or "main"}
    with errors_about(key):
        folder = find_folder(name, begins_with)
        try:
            with quiet():
                return read(str(folder or name), **files, local_files_only=True)
        except OSError as e:  # a file is missing
            if folder is not None:
                raise unreadable(name, e) from e
        check_hub(name, revision)
        try:
            return read(name, **files, local_files_only=False)
        except OSError as e:
            raise unreadable(name, e) from e


@contextmanager
def errors_about(key: str) -> Iterator[None]:
    """Let setting errors raised inside name the setting `key` instead of `name`."""
    try:
        yield
    except SettingError as e:
        e.sentence = e.sentence.replace("{name}", f"{{{key}}}")
        raise


def unreadable(name: str, error: Exception) -> SettingError:
    """Return the error about files that a library cannot read, with the library's reason in one line."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    reason = reason.replace("{", "{{").replace("}", "}}")
    return SettingError(f"{{name}}={name} cannot be loaded as a causal language model with its tokenizer: {reason}")


def find_folder(name: str, begins_with: Sequence[str] = MODEL_FILES) -> Path | None:
    """Return the folder that `name` refers to, or None if it can only be a hub name.

    Raises:
        UserError: there is no such folder, or it has none of the files of `begins_with`.
    """
    folder = Path(__file__).parent / "tiny" if name == TINY else Path(name).expanduser()
    fix = "give a folder written by `save_pretrained` or a hub name, or use lm=tiny."
    if folder.is_dir():
        check_folder(folder, name, begins_with, fix)
        return folder
    if folder.is_file():
        raise SettingError(f"{{name}}={name} is a file: give {{name}}=<the folder with its config and tokenizer>.")
    if name == FINE_TUNED_TINY:
        raise SettingError(f"{{name}}={name} does not exist yet: make it with `python -m sae_lab.lm.tiny.fine_tune`.")
    if is_path(name):
        raise SettingError(f"{{name}}={name} is not a folder: {meant(name, fix)}")
    return None


def check_folder(folder: Path, name: str, begins_with: Sequence[str], fix: str) -> None:
    """Raise a UserError if a folder holds no model, or one that is known by a file to be of another kind."""
    whole = any((folder / file).is_file() for file in begins_with)
    for file, kind in OTHER_FILES.items():
        if any(folder.glob(file)) and not (whole and file == "*.gguf"):
            raise SettingError(f"{{name}}={name} {kind} with {{name}}=<folder or hub name>.")
    if not whole:
        raise SettingError(f"{{name}}={name} is a folder without {begins_with[0]}: {fix}")


def check_hub(name: str, revision: str | None) -> None:
    """Ask the hub for the model once, without retries.

    Raises:
        UserError: the hub cannot be reached, or has no such model or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    unreachable = (
        f"{name} is neither a local folder nor in the Hugging Face cache, and the hub cannot be reached "
        f"({{reason}}): use lm=tiny, give a local folder, or download it first with `hf download {name}`."
    )
    with hub_errors(unreachable):
        try:
            HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        except RevisionNotFoundError as e:
            raise SettingError(
                f"{{revision}}={revision} is not a branch, tag or commit of {name} on the hub: correct {{revision}}."
            ) from e
        except RepositoryNotFoundError as e:
            raise SettingError(
                f"{{name}}={name} is neither a local folder nor a model on the hub that you have access to: "
                "correct {name}, or log in with `hf auth login` if the model is private."
            ) from e


@contextmanager
def quiet() -> Iterator[None]:
    """Disable the progress bars and warnings of `transformers` inside the context, and restore them afterwards."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
