"""Settings are checked as their annotations say, and the sentence about a wrong one is made of the annotation."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import pytest
from annotated_types import Ge, Gt, Le, Len, Lt
from omegaconf import ListConfig, OmegaConf

from sae_lab.runtime.annotations import ErrorMessage
from sae_lab.runtime.checks import check_arguments, check_config
from sae_lab.runtime.errors import SettingError
from sae_lab.saes import TopKSAE

COUNT = Annotated[int, Ge(0)]
RATE = Annotated[float, Gt(0), Le(1)]
OTHER = object()
PAIR = Annotated[list[Annotated[float, Ge(0), Lt(1)]], Len(2, 2), ErrorMessage("must be two numbers")]


def checked(annotation: Any, value: Any) -> Any:
    """What a function of one argument gets."""

    def function(setting):
        return setting

    function.__annotations__ = {"setting": annotation}
    return check_arguments(function)(value)


@pytest.mark.parametrize(
    ("annotation", "value", "meant"),
    [
        (int, 3, 3),
        (int, 1e3, 1000),
        (COUNT | None, None, None),
        (COUNT | None, 2.0, 2),
        (float, 3, 3),
        (float, 0.5, 0.5),
        (RATE, 1, 1),
        (bool, False, False),
        (str, "12", "12"),
        (Literal["row", "batch"], "batch", "batch"),
        (bool | Literal["auto"], True, True),
        (bool | Literal["auto"], "auto", "auto"),
        (list[int], ListConfig([1, 2e0]), [1, 2]),
        (Sequence[int], (), []),
        (Sequence[str] | str, "one", "one"),
        (PAIR, ListConfig([0, 0.99]), [0, 0.99]),
        (dict[str, int], {"a": "anything"}, {"a": "anything"}),
        (TopKSAE, OTHER, OTHER),
    ],
)
def test_what_fits_is_passed_on_as_it_is_meant(annotation, value, meant):
    got = checked(annotation, value)
    assert got == meant
    assert type(got) is type(meant)


@pytest.mark.parametrize(
    ("annotation", "value", "sentence"),
    [
        *((int, value, "must be a whole number") for value in (2.5, True, "3", None, math.inf, math.nan, [1])),
        *((COUNT, value, "must be a whole number of at least 0") for value in (-1, -1.0, False)),
        (COUNT | None, -1, "must be null or a whole number of at least 0"),
        *((float, value, "must be a number") for value in (True, "0.5", None, math.inf, -math.inf, math.nan)),
        *((RATE, value, "must be a number above 0 and at most 1") for value in (0, 1.5, "abc")),
        (Annotated[float, Le(3)], 4, "must be a number of at most 3"),
        *((bool, value, "must be true or false") for value in (1, 0, "true", None)),
        *((str, value, "must be a string") for value in (3, None, True)),
        (Literal["row"] | None, "token", "is not known: choose null or row"),
        (Literal["a", "b", "c"], "d", "is not known: choose a, b or c"),
        (bool | Literal["auto"], "yes", "is not known: choose true, false or auto"),
        *((list[COUNT], value, "must be a list of whole numbers of at least 0") for value in ([-1], 3, "3", [True])),
        *((PAIR, value, "must be two numbers") for value in (0.9, [0.9], [0.9, 1], [0, 0, 0])),
        *((hint, 1e30, "is too large: a whole number is at most 9223372036854775807") for hint in (COUNT, int | None)),
        (COUNT, 10**25, "is too large: a whole number is at most 9223372036854775807"),
        (str | Path, 3, "must be a string or a path"),
        (TopKSAE, "anything", r"must be a part of the config with a setting\._target_: leave out .* below setting"),
        (Callable[..., TopKSAE] | Mapping[str, Any], 3, r"must be a part of the config with a setting\._target_: .*"),
    ],
)
def test_what_does_not_fit_is_told(annotation, value, sentence):
    with pytest.raises(SettingError, match=rf"^setting=\S.* {sentence}\.$"):
        checked(annotation, value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((None, "null"), (True, "true"), ("x", "x"), ("", "''"), (ListConfig([1, None, "a"]), "[1,null,a]")),
        *(({"a": [True]}, "{a: [true]}"), ("{k}", "{k}"), ("a\nb", "a b"), ("x" * 200, f"{'x' * 97}...")),
    ],
)
def test_a_value_is_shown_as_yaml_writes_it(value, shown):
    with pytest.raises(SettingError) as e:
        checked(RATE, value)
    assert str(e.value).startswith(f"setting={shown} must be")


@check_arguments
def function(a: int, *rest: int, b: COUNT = 0, **more: int) -> tuple[Any, ...]:
    """Its own words."""
    return a, rest, b, more


def test_a_checked_function_is_called_like_the_function_itself():
    assert function(1e0, "x", b=2.0, c="y") == (1, ("x",), 2, {"c": "y"})
    assert (function.__name__, function.__doc__) == ("function", "Its own words.")
    assert list(inspect.signature(function).parameters) == ["a", "rest", "b", "more"]


def test_unknown_and_missing_arguments_are_python_s_own_errors():
    with pytest.raises(TypeError, match=r"function\(\) missing 1 required positional argument: 'a'"):
        function()
    with pytest.raises(TypeError, match=r"__init__\(\) got an unexpected keyword argument 'bogus'"):
        TopKSAE(k=2, d_in=4, n_latents=8, bogus=1)
    with pytest.raises(TypeError, match=r"__init__\(\) missing 1 required positional argument: 'k'"):
        TopKSAE(d_in=4, n_latents=8)


def test_a_class_is_checked_by_its_constructor():
    @check_arguments
    @dataclass(frozen=True)
    class Sizes:
        n: COUNT = 1

    assert Sizes(2.0) == Sizes(2)
    with pytest.raises(SettingError, match=r"^n=-1 must be a whole number of at least 0\.$"):
        Sizes(n=-1)


def test_no_author_of_an_sae_has_to_ask_for_the_check():
    class Mine(TopKSAE):
        def __init__(self, rate: RATE = 0.5, **topk: Any):
            super().__init__(**topk)
            self.rate = rate

    try:
        assert Mine.arguments()[:2] == ["rate", "k"]
        with pytest.raises(SettingError, match=r"^rate=2 must be a number above 0 and at most 1\.$"):
            Mine(rate=2, k=2, d_in=4, n_latents=8)
    finally:
        del TopKSAE.registry["Mine"]


class Dials(TypedDict):
    n: COUNT
    rate: RATE


def test_a_config_is_checked_key_by_key():
    cfg = OmegaConf.create({"n": 1e3, "rate": 1, "other": -1, "same": "${n}"})
    check_config(cfg, Dials)
    assert (repr(cfg.n), repr(cfg.rate), repr(cfg.same)) == ("1000", "1", "1000")
    cfg.rate = 2
    with pytest.raises(SettingError, match=r"^rate=2 must be"):
        check_config(cfg, Dials)
