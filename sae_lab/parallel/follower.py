"""Main program of ranks above 0, started by `launch`: train, write no files, exit when rank 0 does."""

import os
import signal
import sys
import threading
import traceback
from importlib import import_module
from pathlib import Path

import torch.distributed as dist

from sae_lab.parallel.collectives import TIMEOUT, process_group
from sae_lab.parallel.launch import HOST, share_threads
from sae_lab.runtime.signals import ALWAYS, IF_FREE


def main(target: str, folder: Path, rank: int, n: int, port: int) -> None:
    """Train the run in `folder` as rank `rank` of n, then wait until rank 0 exits.

    Args:
        target: the function to call with `folder`, as "module:function".
        port: of the TCP store that rank 0 opened.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, (*ALWAYS, *IF_FREE))  # blocked, so that Lightning's handlers never run
    watcher = threading.Thread(target=exit_with_rank_0, daemon=True)
    watcher.start()
    module, _, function = target.partition(":")
    train = getattr(import_module(module), function)  # imported here, after the signals are blocked
    store = dist.TCPStore(HOST, port, n, is_master=False, timeout=TIMEOUT)
    store.add("ready", 1)
    with share_threads(n), process_group(rank, n, store):
        try:
            train(folder)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # at once: another rank that gets no answer checks whether this process has exited
        watcher.join()


def exit_with_rank_0() -> None:
    """Exit when rank 0 closes its end of the pipe or exits."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]))
