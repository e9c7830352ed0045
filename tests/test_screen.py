"""What long work says of itself."""

from sae_lab import screen


def test_a_loop_without_a_terminal_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(screen.time, "perf_counter", lambda: clock[0])
    seen = []
    for item in screen.track("abcdef", "evaluating"):
        seen.append(item)
        clock[0] += 10.0
    assert "".join(seen) == "abcdef"
    assert capsys.readouterr().out == "evaluating 2/6  40 s left\nevaluating 4/6  20 s left\n"
