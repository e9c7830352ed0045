"""What SAEBench and sae-probes need to run on a model in a folder and on data sets in files, without the hub.

Each function replaces as little as possible of the libraries, by name, and says what it stands in for.
"""

import sys
from pathlib import Path

import jaxtyping
import sae_probes  # noqa: F401  its modules are patched below
import transformers
from sae_bench.evals.absorption import common, feature_absorption
from sae_bench.sae_bench_utils import dataset_info, dataset_utils
from sae_lens import SAE
from transformer_lens import HookedTransformer
from transformer_lens import loading_from_pretrained as loading


def load_models_from_folders() -> None:
    """Let `HookedTransformer.from_pretrained(name)` take a folder.

    TransformerLens 3 reads the config and the weights of a folder, but looks its name up in the table of hub models
    first. Of GPT-2 it reads `n_ctx`, which configs saved by transformers 5 call `n_positions`.
    """
    official = loading.get_official_model_name
    loading.get_official_model_name = lambda name: name if Path(name).is_dir() else official(name)
    transformers.GPT2Config.attribute_map = {**transformers.GPT2Config.attribute_map, "n_ctx": "n_positions"}


def leave_shapes_unchecked() -> None:
    """Switch off jaxtyping's checks in SAEBench.

    Its sparse probing gives one name to the rows of a class (600) and to those of a class and its negatives (1,200).
    Today's beartype looks into dictionaries, so the evaluation ends with a violated type hint.
    """
    jaxtyping.config.update("jaxtyping_disable", True)


def link_model(sae: SAE, folder: Path) -> str:
    """Make the name by which the SAE knows its model a link to the model's folder; return the name.

    The libraries load the model by `cfg.json`'s metadata.model_name, and call files of results by it.
    """
    name = Path(sae.cfg.metadata.model_name)
    name.parent.mkdir(parents=True, exist_ok=True)
    name.unlink(missing_ok=True)
    name.symlink_to(folder)
    return str(name)


def use_probe_data(folder: Path) -> list[str]:
    """Let sae-probes read its data sets from a folder `data` of the shape of its own; return their names."""
    modules = [module for name, module in sys.modules.items() if name.startswith("sae_probes.")]
    for module in modules:
        if hasattr(module, "DATA_PATH"):
            module.DATA_PATH = folder
    data = sys.modules["sae_probes.utils_data"]
    for cached in (data.get_binary_df, data.read_dataset_df, data.get_dataset_sizes):
        cached.cache_clear()
    for module in modules:
        if hasattr(module, "DATASET_SIZES"):
            module.DATASET_SIZES = data.get_dataset_sizes()
    return data.get_numbered_binary_tags()


def use_text_classes(folder: Path, n_classes: int) -> str:
    """Let SAEBench's sparse probing read {"text", "label"} rows of a folder's train and test files; return its name.

    They have the columns of AG News, whose reader is used. SAEBench knows data sets by their hub names only.
    """
    name, known = str(folder), dataset_utils.get_multi_label_train_test_data
    classes = dataset_info.chosen_classes_per_dataset[name] = [str(i) for i in range(n_classes)]

    def read(dataset_name: str, n_train: int, n_test: int, seed: int):
        if dataset_name != name:
            return known(dataset_name, n_train, n_test, seed)
        return dataset_utils.get_ag_news_dataset(name, classes, n_train, n_test, seed)

    dataset_utils.get_multi_label_train_test_data = read
    return name


def stop_after(layer: int) -> None:
    """Let `run_with_cache` stop after a layer. Absorption runs whole models, and uses activations of one layer only."""
    run = HookedTransformer.run_with_cache
    HookedTransformer.run_with_cache = lambda *args, **kwargs: run(*args, **{"stop_at_layer": layer + 1, **kwargs})


def use_words(words: list[str]) -> None:
    """Let the absorption evaluation ask for the first letters of these words instead of the whole vocabulary."""
    for module in (common, feature_absorption):
        module.get_alpha_tokens = lambda tokenizer: words
