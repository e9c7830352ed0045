"""Signals: the first is recorded, its echo ignored, a later one ends the process."""

import os
import signal

import pytest

from sae_lab.runtime import signals
from sae_lab.runtime.errors import Interrupted, SafeStop
from sae_lab.runtime.signals import deferred_signals, raise_if_stopped, received_signal


def test_a_signal_waits_until_nothing_is_half_done():
    before = signal.getsignal(signal.SIGTERM)
    raise_if_stopped()
    with deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert received_signal() == signal.SIGTERM
        with pytest.raises(SafeStop, match="Stopped by SIGTERM") as stopped:
            raise_if_stopped()
        assert stopped.value.exit_code == 143
        signals._recorder.received = None
    with pytest.raises(SafeStop), deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)  # after the last safe place: raised at the end of the block
    assert signal.getsignal(signal.SIGTERM) == before
    assert received_signal() is None


def test_an_echo_is_the_same_wish_and_a_later_signal_another(monkeypatch):
    def send_all() -> None:
        with deferred_signals():
            for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), signum)
            assert received_signal() == signal.SIGTERM
            monkeypatch.setattr(signals, "ECHO", -1.0)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="second signal") as stopped:
        send_all()
    assert stopped.value.exit_code == 130
    assert not isinstance(stopped.value, SafeStop)  # in the middle of a step: nothing may be saved


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_nobody_handles_is_recorded_and_any_other_is_left_alone(signum):
    before, theirs = signal.getsignal(signum), lambda *_: None
    try:
        for handler in (signal.SIG_IGN, theirs):
            signal.signal(signum, handler)
            with deferred_signals():
                assert signal.getsignal(signum) == handler
        signal.signal(signum, signal.SIG_DFL)
        with pytest.raises(SafeStop, match=signum.name), deferred_signals():
            os.kill(os.getpid(), signum)
        assert signal.getsignal(signum) == signal.SIG_DFL
    finally:
        signal.signal(signum, before)
