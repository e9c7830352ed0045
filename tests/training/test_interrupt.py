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


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_nobody_handles_is_recorded_and_any_other_is_left_alone(signum):
    before, theirs = signal.getsignal(signum), lambda *_: None
    signals = Signals()
    try:
        for handler in (signal.SIG_IGN, theirs):
            signal.signal(signum, handler)
            signals.listen()
            assert signal.getsignal(signum) == handler
            signals.restore()
        signal.signal(signum, signal.SIG_DFL)
        signals.listen()
        signals.listen()  # again, as a group does before every batch
        os.kill(os.getpid(), signum)
        assert signals.received == signum
        signals.restore()
        assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        signals.restore()
        signal.signal(signum, before)
