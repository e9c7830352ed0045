"""A rank above 0, as `launch` starts it: it trains along, writes no file, and ends when rank 0 does."""

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
from sae_lab.runtime.signals import Signals


def main(target: str, folder: Path, rank: int, n: int, port: int) -> None:
    """A rank above 0: train the run in `folder`, then wait for rank 0 to have done so."""
    signal.pthread_sigmask(signal.SIG_BLOCK, Signals.SIGNALS)  # whatever handlers Lightning sets
    follower = threading.Thread(target=exit_with_rank_0, daemon=True)
    follower.start()
    module, _, function = target.partition(":")
    train_along = getattr(import_module(module), function)  # now, not at the top: signals had to be blocked first
    store = dist.TCPStore(HOST, port, n, is_master=False, timeout=TIMEOUT)
    store.add("ready", 1)
    with share_threads(n), process_group(rank, n, store):
        try:
            train_along(folder)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # at once: who hears no more of this process looks whether it has ended
        follower.join()


def exit_with_rank_0() -> None:
    """End this process when rank 0 closes its end of the pipe, or ends."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]))
