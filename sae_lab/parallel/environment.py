"""The processes that torchrun, srun or launch.py started together, as the environment of each describes them."""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from sae_lab.runtime.errors import UserError, first_line

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

TORCHELASTIC, SLURM = "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"
"""Variables that torchelastic (torchrun, launch.py) and srun set for the processes that they start."""
STEP_TASKS = "SLURM_STEP_TASKS_PER_NODE"


@dataclass(frozen=True)
class Place:
    """A process's place among those that were started together.

    Attributes:
        rank, size: its number among all of them, and how many there are.
        local_rank, local_size: the same among those of its machine.
        address, port: of the store through which they find each other.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int


def place() -> Place | None:
    """Return this process's place; None if no other process was started with it.

    Raises:
        UserError: variables of the environment contradict each other.
    """
    try:
        found = cluster_environment()
        if found is None or found.world_size() == 1:
            return None
        local_size = int(os.environ["LOCAL_WORLD_SIZE" if TORCHELASTIC in os.environ else "SLURM_NTASKS_PER_NODE"])
        here = found.global_rank(), found.world_size(), found.local_rank(), local_size
        return Place(*here, found.main_address, found.main_port)
    except (RuntimeError, KeyError, ValueError) as e:
        reason = f"{e.args[0]} is not set" if isinstance(e, KeyError) else first_line(e)
        raise UserError(f"the environment does not say how the processes were started: {reason}.") from e


def is_first() -> bool:
    """Return whether this process is rank 0 of those that were started together, or was started alone."""
    here = place()
    return here is None or here.rank == 0


def cluster_environment() -> "ClusterEnvironment | None":
    """Return what reads the variables of the launcher that started this process."""
    if TORCHELASTIC in os.environ:
        from lightning.fabric.plugins.environments import TorchElasticEnvironment  # here: it imports for seconds

        return TorchElasticEnvironment()
    if SLURM in os.environ:  # set by srun, and not in a batch script: there one process runs for all tasks
        from lightning.fabric.plugins.environments import SLURMEnvironment

        if not SLURMEnvironment.detect():
            return None
        if STEP_TASKS in os.environ:
            os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks_of_node())  # Lightning's class asks for it
        return SLURMEnvironment()
    return None


def tasks_of_node() -> int:
    """Return the number of srun's tasks on this node. The variable holds those of all nodes, as in `2(x3),1`.

    SLURM_NTASKS_PER_NODE is what was typed for srun or for the batch script around it, and often missing.
    """
    parts = [part.removesuffix(")").split("(x") for part in os.environ[STEP_TASKS].split(",")]
    tasks = [int(n) for n, *times in parts for _ in range(int(times[0]) if times else 1)]
    return tasks[int(os.environ["SLURM_NODEID"])]


def connect(to: Place, timeout: timedelta) -> dist.Store:
    """Connect to the store of the processes that were started together. Rank 0 opens it, unless its launcher has."""
    store, _, _ = next(rendezvous(f"tcp://{to.address}:{to.port}", to.rank, to.size, timeout=timeout))
    return store


_stores: dict[Place, dist.Store] = {}


def shared_store(to: Place, timeout: timedelta) -> dist.Store:
    """Return this process's connection to the store. It stays open, since rank 0 may hold the store for the others.

    Args:
        timeout: of the connection, where there is none yet.
    """
    if to not in _stores:
        _stores[to] = connect(to, timeout)
    return _stores[to]


def choose_interface(to: Place) -> None:
    """Let gloo use the network interface that reaches rank 0, unless GLOO_SOCKET_IFNAME names one.

    By itself it takes that of the host's name, which is the loopback on many machines.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((to.address, to.port))  # sends nothing
        own = route.getsockname()[0]
    names = [name for name, found in psutil.net_if_addrs().items() if any(a.address == own for a in found)]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


WAIT = timedelta(minutes=30)  # for rank 0
TO_SPEAK = timedelta(seconds=10)  # for the store, if a process ends before it has joined the others
_questions = count()


def ask_rank_0(make: Callable[[], str]) -> str:
    """Return the text that make() returns on rank 0, before the processes have joined a process group.

    All processes must ask the same questions in the same order. A process that was started alone asks itself.
    """
    if (here := place()) is None:
        return make()
    store, key = shared_store(here, WAIT), f"sae_lab/{next(_questions)}"
    if here.rank == 0:
        store.set(key, make())
    return store.get(key).decode()


def first_to_say(message: str) -> bool:
    """Return whether no other process of this terminal has said the message, when a command ends with it.

    All processes of a run meet the same mistake. Each machine of torchrun has a terminal, and srun has one for all. A
    process that does not reach the others within TO_SPEAK says what it has to say.
    """
    try:
        here = place()
    except UserError:
        return True
    if here is None:
        return True
    key = f"sae_lab/said/{os.environ.get('GROUP_RANK', '')}/{message}"
    told: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):  # no process holds a store
            told.append(shared_store(here, TO_SPEAK).add(key, 1))

    asking = threading.Thread(target=ask, daemon=True)  # a store on a silent machine does not time out
    asking.start()
    asking.join(TO_SPEAK.total_seconds())
    first = told in ([], [1])
    if not first:
        time.sleep(1.0)  # the agent, which ends all when one exits, leaves the first one time to speak
    return first


def own_gpu() -> int | None:
    """Return the number of this process's own GPU among those it sees; None if the processes have to do without."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (here := place()) is None:
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return rank if found >= size else None
    if found == 1 and SLURM in os.environ:  # srun shows each task its own GPU only
        return 0
    return here.local_rank if found >= here.local_size else None
