"""Two hosts that train one SAE: by torchrun to the weights of one process, and what happens when one is lost."""

import fcntl
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from groups import SMALL, config
from hosts import Host, two_hosts
from safetensors.torch import load_file
from shell import body, fork

from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.cli.help import CONF
from sae_lab.parallel import heartbeat
from sae_lab.runtime.signals import received_signal
from sae_lab.training.run import train_run

pytestmark = pytest.mark.process

SETTINGS = ["sae=batch_topk", "k=4", "sae.dead_after=2"]
TYPED = [*SMALL, *SETTINGS, "trainer=ddp", "trainer.accelerator=cpu"]


def torchrun(host: Host, port: int, said: str, cwd: Path, overrides: list[str]) -> None:
    """The command of that name on one host, with one process."""
    from torch.distributed.run import main

    host.enter()
    os.chdir(cwd)
    redirect(said)
    os.environ |= {"PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1"}
    where = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={host.address}", f"--master-port={port}"]
    main([*where, f"--node-rank={host.number}", "-m", "sae_lab.train", *overrides])


def redirect(said: str) -> None:
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(Path(said, name), os.O_WRONLY | os.O_CREAT), descriptor)


def one_process(host: Host, port: int, said: str, cwd: Path, overrides: list[str], event: str, at: int, n: int) -> None:
    """What torchrun starts on one host. On host `at` an event happens where the n-th batch is asked for."""
    host.enter()
    if event in ("silent", "orphaned"):
        heartbeat.PERIOD = 0.5
    if host.number == at:
        if event == "orphaned":
            be_child_of_agent(host, port, said)
        before_batch(n, {"silent": host.fall_silent, "killed": kill_this, "orphaned": kill_agent}[event])
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(event == "orphaned")
    rank = {"RANK": str(host.number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    found = {"MASTER_ADDR": host.address, "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    body("sae_lab.train", tuple(overrides), said, str(cwd), 1, rank | found)


def be_child_of_agent(host: Host, port: int, said: str) -> None:
    """Go on in a child of this process, which waits as torchrun does and holds the store."""
    if child := os.fork():
        store = dist.TCPStore(host.address, port, 2, is_master=True, wait_for_workers=False)
        os.waitpid(child, 0)
        del store
        os._exit(0)
    multiprocessing.process._parent_process = None
    heartbeat.PARENT = os.getppid()
    lock(said)  # until it ends


def lock(said: str | Path) -> int:
    file = os.open(Path(said, "lock"), os.O_CREAT | os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def kill_this() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_agent() -> None:
    """And go on once this process was told to stop and the store was missed."""
    os.kill(os.getppid(), signal.SIGKILL)
    while received_signal() is None:
        time.sleep(0.01)
    time.sleep(3 * heartbeat.PERIOD)


def before_batch(n: int, act) -> None:
    draw, drawn = ShuffledBlocks.__next__, []

    def drawing(self):
        drawn.append(None)
        if len(drawn) == n:
            act()
        return draw(self)

    ShuffledBlocks.__next__ = drawing


def run_both(hosts: list[Host], target, cwd: Path, *arguments) -> list[tuple[int, str]]:
    """The exit code and the errors of the command on each host."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind((hosts[0].address if hosts[0].namespace is None else "", 0))
        port = free.getsockname()[1]
        free.close()
        said = [Path(folder, str(host.number)) for host in hosts]
        processes = []
        for host, place in zip(hosts, said, strict=True):
            place.mkdir()
            processes.append(fork(target, host, port, str(place), cwd, *arguments))
        processes[0].join()
        if hosts[0].namespace is None and "silent" in arguments:
            processes[1].kill()  # it was stopped
        processes[1].join()
        for place in said:
            os.close(lock(place))
        return [(p.exitcode, (place / "stderr").read_text()) for p, place in zip(processes, said, strict=True)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    with two_hosts() as found:
        yield found


@pytest.fixture(scope="module")
def whole(hosts, tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    root = tmp_path_factory.mktemp("whole")
    for code, said in run_both(hosts, torchrun, root, TYPED):
        assert code == 0, said
    [day] = (root / "outputs").iterdir()
    [folder] = day.iterdir()  # rank 1 made none of its own
    return folder


def test_torchrun_on_two_hosts_trains_the_sae_of_one_process(whole, tmp_path):
    train_run(config(tmp_path / "alone", *SETTINGS))
    theirs, ours = (load_file(folder / "sae" / "sae.safetensors") for folder in (tmp_path / "alone", whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)
    names = [{p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (tmp_path / "alone", whole)]
    assert names[1] - names[0] == {"train.log", ".hydra/hydra.yaml", ".hydra/overrides.yaml"}
    assert (whole / "train.log").read_text().count("training 12 steps") == 1


LOSSES = [("killed", 0, 7, 4), ("killed", 1, 7, 8), ("silent", 1, 3, 8), ("orphaned", 0, 2, 10)]
"""What happens to which host at which batch of each start, and the step of the last checkpoint then.

The last one is the loss of an agent, with the store: the processes stop as by a signal.
"""


def test_a_lost_host_ends_the_other_in_a_sentence_and_the_same_command_continues(hosts, whole, tmp_path):
    typed = [*TYPED, f"hydra.run.dir={tmp_path / 'run'}"]
    for event, at, batch, _ in LOSSES:
        ended = run_both(hosts, one_process, tmp_path, typed, event, at, batch)
        hosts[at].mend()
        code, said = ended[1 - at]
        *_, last = said.strip().splitlines()
        assert code == (143 if event == "orphaned" else 1)
        assert last.endswith(": the same command continues.")
        if event == "silent":
            assert f"rank {at} of 2 gave no sign of life" in last
        else:
            assert ended[at][0] == -signal.SIGKILL
        if event == "orphaned":
            assert last.startswith("Stopped by SIGTERM at step 10 of 12, saved as ")
            assert last in ended[at][1]
    again = run_both(hosts, one_process, tmp_path, typed, "none", -1, 0)
    assert [code for code, _ in again] == [0, 0], again
    log = (tmp_path / "run" / "train.log").read_text()
    assert [int(step) for step in re.findall("continuing from step ([0-9]+)", log)] == [step for *_, step in LOSSES]
    for file in ("sae/sae.safetensors", "metrics.json"):
        assert (tmp_path / "run" / file).read_bytes() == (whole / file).read_bytes()


def test_a_silent_host_is_noticed_within_a_minute():
    assert heartbeat.PERIOD * (heartbeat.PATIENCE + 4) < 60
