"""400 draws of wrong, extreme and contradicting settings: each ends in success or in one sentence, and in no file."""

import contextlib
from pathlib import Path

import fuzz
import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run, a cache and a text."""
    with contextlib.chdir(tmp_path_factory.mktemp("fuzz")) as where:
        fuzz.prepare()
        yield where


@pytest.mark.parametrize("first", range(0, 400, 50))
def test_each_draw_ends_in_success_or_in_one_sentence(first, folder):
    with fuzz.memory_limit(6 * 2**30):
        for seed in range(first, first + 50):
            before = {*Path().rglob("*")}
            if fuzz.outcome(fuzz.draw(seed)) != "success":
                assert {*Path().rglob("*")} <= before
