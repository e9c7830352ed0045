"""A few of the runs of `kill_anywhere.py`, each killed where it hurts."""

import signal
from pathlib import Path

import pytest

# Its module imports the entry points, whose Lightning and transformers take seconds: once, for the processes it forks.
from kill_anywhere import Grounds, Kill, differences

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def grounds(tmp_path_factory) -> Grounds:
    return Grounds(Path(tmp_path_factory.mktemp("kill")))


@pytest.mark.parametrize(
    ("data", "prefetch", "kill"),
    [
        ("streamed", True, Kill(signal.SIGKILL, "checkpoint", 3, 0.001)),
        ("streamed", False, Kill(signal.SIGTERM, "refill", 4, 0.001)),
        ("store", False, Kill(signal.SIGKILL, "tokenizing", 7, 0.0)),
        ("window", True, Kill(signal.SIGKILL, "window", 2, 0.001)),
        ("cached", True, Kill(signal.SIGKILL, "evaluation", 1, 0.005)),
        ("chats", False, Kill(signal.SIGKILL, "refill", 3, 0.001)),
        ("stream of chats", False, Kill(signal.SIGKILL, "refill", 4, 0.001)),
        ("tokens", False, Kill(signal.SIGTERM, "checkpoint", 3, 0.001)),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(grounds, data, prefetch, kill):
    codes, different = grounds.kill(f"{data}-{kill.place}", data, prefetch, [kill])
    assert codes == [143 if kill.signum == signal.SIGTERM else -9, 0]
    assert different == []


def test_a_killed_reader_of_windows_ends_the_run_in_a_sentence_and_the_same_command_continues(grounds):
    codes, different = grounds.kill("window-reader", "window", False, [Kill(signal.SIGKILL, "reader", 2, 0.0)])
    assert codes == [1, 0]
    assert different == []
    said = (grounds.folder / "window-reader.log").read_text()
    assert "train: the process that reads the text ahead died (exit code -9): run the same command again" in said
    assert "Traceback" not in said


def test_a_difference_would_be_seen(grounds):
    whole, other = grounds.whole["streamed"], grounds.whole["cached"]
    seen = " ".join(differences(whole, other))
    assert all(part in seen for part in ("W_enc", "exp_avg", "metrics.json", "metrics.csv", "sae.safetensors"))
