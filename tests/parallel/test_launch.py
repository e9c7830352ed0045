"""Processes that are started together: what comes back from them, how they fail and stop, how they find each other."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing import context
from multiprocessing.context import SpawnContext
from pathlib import Path

import psutil
import pytest
import shell
import torch.distributed as dist

from sae_lab.parallel import heartbeat
from sae_lab.parallel.environment import Place, ask_rank_0, place
from sae_lab.parallel.group import on_rank_0, process_group
from sae_lab.parallel.launch import keep_error, run_ranks
from sae_lab.parallel.mesh import rank, world_size
from sae_lab.runtime.errors import FolderInUse, Interrupted, SafeStop, UserError
from sae_lab.runtime.signals import deferred_signals, received_signal

started = pytest.mark.process


def meet(values: list[int]) -> tuple:
    own = place()
    with process_group():
        told = on_rank_0(lambda: values[rank()])
        return told, (rank(), world_size()), own.local_size, ask_rank_0(lambda: "asked")


@started
def test_rank_0_returns_its_result(tmp_path):
    assert run_ranks(2, tmp_path / "run", meet, [10, 20]) == (10, (0, 2), 2, "asked")
    assert not (tmp_path / "run").exists()


def fail(way: str, failing: int) -> None:
    with process_group():
        if rank() == failing:
            if way == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"mistake": FolderInUse, "bug": ZeroDivisionError}[way]("what went wrong")
        on_rank_0(lambda: None) if failing else on_rank_0(time.sleep)


@started
@pytest.mark.parametrize(
    ("way", "failing", "error", "words"),
    [
        ("mistake", 1, FolderInUse, "^what went wrong$"),
        ("bug", 0, ZeroDivisionError, "^what went wrong$"),
        ("bug", 1, UserError, r"process 1 of 2 ended early \(ZeroDivisionError: what went wrong\): see .*rank_1.log"),
        ("killed", 1, UserError, r"process 1 of 2 ended early \(SIGKILL\): the same command continues\."),
    ],
)
def test_the_failure_of_one_process_ends_all(tmp_path, capfd, way, failing, error, words):
    with pytest.raises(error, match=words):
        run_ranks(2, tmp_path, fail, way, failing)
    logs = [file.name for file in tmp_path.iterdir()]
    assert logs == (["rank_1.log"] if (way, failing) == ("bug", 1) else [])
    assert all("Traceback" in (tmp_path / name).read_text() for name in logs)
    assert "torch.distributed.elastic" not in capfd.readouterr().err


def wait_for_signal(ready: Path) -> None:
    with deferred_signals():
        (ready / os.environ["RANK"]).touch()
        while received_signal() is None:
            time.sleep(0.01)


@started
def test_signals_are_passed_on_and_end_it_as_they_end_one_process(tmp_path):
    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    with pytest.raises(SafeStop, match=r"^Stopped by SIGTERM$") as stop:
        run_ranks(2, tmp_path, wait_for_signal, tmp_path)
    assert stop.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def save_after_stop(ready: Path) -> None:
    """Take longer to save than the command would take to end without its processes."""
    with deferred_signals():
        (ready / f"started{os.environ['RANK']}").touch()
        while received_signal() is None:
            time.sleep(0.01)
        time.sleep(0.5)
        (ready / f"saved{os.environ['RANK']}").touch()


@started
@pytest.mark.parametrize("spawn", [SpawnContext(), shell.FORKS], ids=["spawned", "forked"])
def test_a_signal_to_all_of_them_lets_the_processes_save(tmp_path, monkeypatch, spawn):
    """`timeout` and a closed terminal send theirs to all processes of a command, which may come from standard input."""
    monkeypatch.setitem(context._concrete_contexts, "spawn", spawn)
    for name, value in (("__spec__", None), ("__file__", "<stdin>")):
        monkeypatch.setattr(sys.modules["__main__"], name, value, raising=False)
    signum = signal.SIGHUP if spawn is shell.FORKS else signal.SIGTERM
    was = signal.signal(signum, signal.SIG_DFL)

    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        for process in (*multiprocessing.active_children(), psutil.Process()):
            os.kill(process.pid, signum)

    threading.Thread(target=send).start()
    with pytest.raises(Interrupted, match=f"^Stopped by {signum.name}$"):
        run_ranks(2, tmp_path, save_after_stop, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["saved0", "saved1", "started0", "started1"]
    signal.signal(signum, was)


def be_stopped(ready: Path) -> None:
    with process_group():
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        on_rank_0(lambda: time.sleep(60))


@started
def test_a_signal_to_one_process_outside_of_steps_stops_the_command(tmp_path):
    with pytest.raises(Interrupted, match=r"^Stopped by SIGTERM$") as stop:
        run_ranks(2, tmp_path, be_stopped, tmp_path)
    assert stop.value.exit_code == 143


def leave(kind: type[BaseException], *arguments) -> str:
    """What the first process says of the second one, which leaves with an error."""
    try:
        with process_group():
            if rank() == 1:
                raise kind(*arguments)
            on_rank_0(lambda: None)
            dist.barrier()
    except (UserError, Interrupted) as e:
        return f"{type(e).__name__}: {e}"
    except ValueError as e:
        return str(e)
    raise AssertionError


@started
@pytest.mark.parametrize(
    ("error", "said"),
    [
        ((FolderInUse, "k=0 must be above 0."), "FailedRank: k=0 must be above 0."),
        ((Interrupted, "Stopped by SIGTERM", 15), "Interrupted: Stopped by SIGTERM"),
        ((ValueError, "odd"), "FailedRank: rank 1 of 2 has failed (ValueError: odd)."),
    ],
)
def test_a_process_says_why_the_other_one_left(tmp_path, error, said):
    assert run_ranks(2, tmp_path, leave, *error) == said


def test_a_process_stops_when_the_one_that_started_it_is_gone(monkeypatch, caplog):
    parents = iter([heartbeat.PARENT, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(heartbeat, "PERIOD", 0.01)
    with pytest.raises(SafeStop, match="Stopped by SIGTERM"), deferred_signals():
        heartbeat.stop_without_parent(threading.Event())
    assert caplog.messages == ["the process that started this one is gone, so it stops"]


def test_an_error_that_nobody_takes_raises_nothing(tmp_path):
    keep_error(tmp_path / "gone" / "0.error", UserError("too late"))


# --- the environment

SRUN = {"STEP_ID": 0, "NTASKS": 8, "NTASKS_PER_NODE": 4, "PROCID": 5, "LOCALID": 1, "NODEID": 1, "JOB_ID": 124711}


def test_srun_gives_a_process_its_place(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):  # Lightning's class sets the first two
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in SRUN.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("SLURM_NODELIST", "node[07-08]")
    assert place() == Place(5, 8, 1, 4, "node07", 19711)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(UserError, match=r"how the processes were started: .*--ntasks-per-node=8"):
        place()
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "3,5(x2)")  # srun -n
    assert place() == Place(5, 8, 1, 5, "node07", 19711)
    monkeypatch.delenv("SLURM_STEP_ID")  # a batch script
    assert place() is None


def test_a_variable_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match=r"how the processes were started: LOCAL_WORLD_SIZE is not set\.$"):
        place()


class SignalHandler:
    """As submitit's, which is known by the name of its method."""

    def __init__(self) -> None:
        self.saved: list[bool] = []
        self.done = False

    def checkpoint_and_try_requeue(self, signum: int, frame: object) -> None:
        self.saved.append(self.done)


def save_after_signal(submitit: SignalHandler) -> None:
    with deferred_signals():
        os.kill(os.getpid(), signal.SIGUSR2)
        assert submitit.saved == []
        submitit.done = True


def test_a_job_is_queued_again_once_everything_is_saved():
    submitit = SignalHandler()
    before = signal.signal(signal.SIGUSR2, submitit.checkpoint_and_try_requeue)
    try:
        with pytest.raises(SafeStop, match="SIGUSR2"):
            save_after_signal(submitit)
        assert submitit.saved == [True]
    finally:
        signal.signal(signal.SIGUSR2, before)
