"""Build ActivationData from several texts: the function behind `data=mixture`."""

import logging
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Gt

from sae_lab.activations.data import ActivationData
from sae_lab.lm.base import LanguageModel
from sae_lab.runtime.checks import check_arguments, check_value, show
from sae_lab.runtime.errors import SettingError
from sae_lab.text.current_part import reading_part
from sae_lab.text.mixture import MixedText, Part
from sae_lab.text.shares import whole_shares
from sae_lab.text.text import Text

log = logging.getLogger(__name__)


@check_arguments
def mixture(
    lm: LanguageModel,
    sources: Any,
    weights: Any = None,
    *,
    seq_len: int,
    pack: bool,
    order: Literal["shuffled", "as_read"],
    seed: int,
    parts: Any = None,
    **stream: Any,
) -> ActivationData:
    """Return activations on several texts, mixed by shares of tokens (`data=mixture`).

    Args:
        lm: the language model.
        sources: two or more functions of from_text.py with their own settings (`functools.partial`), in a list or by
            name.
        weights: positive numbers, in a list or by name as the sources are; None: equal shares.
        parts: what the user typed. conf/data/mixture.yaml makes the sources of it.
        stream: the other arguments of ActivationData.

    Raises:
        UserError: the weights do not fit the sources, or a source is no text.
    """
    functions = keyed("parts", sources)
    if len(functions) < 2:
        raise SettingError("{parts} must have two texts or more: for a single one, type data=CHOICE and its keys.")
    shares = whole_shares(weights_of(functions, weights))
    texts = [
        Part(key, share, text_of(key, source, lm=lm, seq_len=seq_len, pack=pack, order=order, seed=seed))
        for (key, source), share in zip(functions.items(), shares, strict=True)
    ]
    shown = (f"{part.share / sum(shares):.4g} from data.{part.key} ({name_of(functions[part.key])})" for part in texts)
    log.info("mixture of tokens: %s", ", ".join(shown))
    return ActivationData(lm, MixedText(texts), seed=seed, **stream)


def keyed(name: str, values: Any) -> dict[str, Any]:
    """Return the values of a list or a mapping by the keys that the user types: `parts[0]` or `parts.code`."""
    if isinstance(values, Mapping):
        return {f"{name}.{key}": value for key, value in values.items()}
    if isinstance(values, Sequence) and not isinstance(values, str):
        return {f"{name}[{i}]": value for i, value in enumerate(values)}
    raise SettingError(f"{{{name}}}={show(values)} must be a list or a mapping, with a value for each part.")


def weights_of(parts: Mapping[str, Any], weights: Any) -> list[float]:
    """Return the weight of each part, in their order; raise a SettingError if the weights are not positive numbers."""
    if weights is None:
        return [1] * len(parts)
    given = keyed("weights", weights)
    wanted = [key.replace("parts", "weights", 1) for key in parts]
    if {*given} != {*wanted}:
        names = [key.partition(".")[2] for key in parts]
        kind = f"a mapping of {', '.join(names)} to numbers" if all(names) else f"a list of {len(parts)} numbers"
        raise SettingError(f"{{weights}}={show(weights)} must be {kind}, as {{parts}} is: one weight for each part.")
    return check_value("weights", [given[key] for key in wanted], Sequence[Annotated[float, Gt(0)]])


def text_of(key: str, source: Any, **settings: Any) -> Text:
    """Return the text of a part, with the settings of the mixture."""
    with reading_part(key):
        return source(make=text_only, **settings)


def text_only(lm: LanguageModel, text: Text, **stream: Any) -> Text:
    return text


def name_of(source: Any) -> str:
    return getattr(getattr(source, "func", source), "__name__", "text")
