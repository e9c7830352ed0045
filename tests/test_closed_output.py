"""Commands whose output nobody reads to its end."""

import os
import sys

import pytest

from sae_lab.cli.closed_output import readers_may_leave


def test_a_reader_that_has_its_lines_ends_the_command_without_a_word(monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as left, readers_may_leave():
            print("x" * 100_000)
    assert left.value.code == 141
    assert capfd.readouterr().err == ""


def test_another_broken_pipe_is_an_error():
    with pytest.raises(BrokenPipeError, match="of a process"), readers_may_leave():
        raise BrokenPipeError("of a process")
