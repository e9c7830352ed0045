"""Signals: the first is noted, its echo ignored, a later one ends the process."""

import os
import signal

import pytest

from sae_lab.runtime.errors import Interrupted
from sae_lab.runtime.signals import Signals


def test_an_echo_is_the_same_wish_and_a_later_signal_another(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    signals.listen()
    try:
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), signum)
        assert signals.received == signal.SIGTERM
        monkeypatch.setattr(Signals, "ECHO", -1.0)
        with pytest.raises(Interrupted, match="second signal") as stopped:
            os.kill(os.getpid(), signal.SIGINT)
        assert stopped.value.exit_code == 130
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGTERM) == before
