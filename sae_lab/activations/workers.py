"""What runs a language model over text rows: the thread that asks, or one for each of several copies of the model."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_lab.activations.finite import FiniteCheck, remedy_for
from sae_lab.lm.base import LanguageModel
from sae_lab.lm.packing import one_sequence_per_row
from sae_lab.runtime.device import send


class Pending(Protocol):
    """Rows that are being computed: a tensor of their number, width and dtype, and how to wait for them."""

    rows: Float[Tensor, "n s d"]

    def wait(self) -> Float[Tensor, "n s d"]:
        """Wait for the rows and return them.

        Raises:
            UserError: they are not finite.
        """
        ...


def rows_elsewhere(lm: LanguageModel, n: int) -> Float[Tensor, "n s d"]:
    """Return a meta tensor that stands in for rows that another rank or thread computes."""
    return torch.empty(n, len(lm.sites), lm.d, dtype=lm.dtype, device="meta")


def launch_activations(lm: LanguageModel, tokens: Int[Tensor, "r t"], keep: Bool[Tensor, "r t"]) -> FiniteCheck:
    """Start to compute the activations at the positions to keep. The host does not wait for a GPU.

    Which rows are kept is known on the CPU, where `tokens` and `keep` are: a mask on the GPU would make the host wait
    for the number of its rows.
    """
    with nullcontext() if lm.device.type == "cpu" else one_sequence_per_row():
        rows = lm.activations(send(tokens, lm.device)).flatten(0, 1)
    if not keep.all():
        rows = rows.index_select(0, send(keep.flatten().nonzero().squeeze(1), rows.device))
    return FiniteCheck(rows, lm.sites, remedy_for(lm, rows.dtype))


def kept_activations(
    lm: LanguageModel, tokens: Int[Tensor, "r t"], keep: Bool[Tensor, "r t"]
) -> Float[Tensor, "n s d"]:
    """Return the activations at the positions to keep.

    Raises:
        UserError: they are not finite.
    """
    return launch_activations(lm, tokens, keep).wait()


class Worker:
    """A language model that runs in the thread that asks. On a GPU the pass is launched, and the host does not wait.

    Args:
        lock: held meanwhile, because the hooks of a model are not thread-safe.
        stream: the CUDA stream of the passes; None: the current one.
    """

    def __init__(self, lm: LanguageModel, lock: Lock, stream: torch.cuda.Stream | None = None):
        self.lm, self.lock, self.stream = lm, lock, stream

    def launch(self, tokens: Int[Tensor, "r t"], keep: Bool[Tensor, "r t"]) -> Pending:
        with self.lock, nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            return launch_activations(self.lm, tokens, keep)

    def close(self) -> None:
        pass


class Promise:
    """Rows that a thread computes."""

    def __init__(self, rows: Float[Tensor, "n s d"], future: Future[Float[Tensor, "n s d"]]):
        self.rows, self.wait = rows, future.result


class ThreadWorker(Worker):
    """A language model that runs in a thread of its own: on a CPU, a pass would keep the one that asks.

    The thread takes passes in the order in which they are asked for. What fails in it is raised by `wait`.
    """

    def __init__(self, lm: LanguageModel, lock: Lock):
        super().__init__(lm, lock)
        # The rounding of products depends on the number of threads, which a new thread takes from the process.
        self.pool = ThreadPoolExecutor(1, "lm", torch.set_num_threads, (torch.get_num_threads(),))

    def launch(self, tokens: Int[Tensor, "r t"], keep: Bool[Tensor, "r t"]) -> Pending:
        return Promise(rows_elsewhere(self.lm, int(keep.sum())), self.pool.submit(self._run, tokens, keep))

    def _run(self, tokens: Int[Tensor, "r t"], keep: Bool[Tensor, "r t"]) -> Float[Tensor, "n s d"]:
        with self.lock:
            return kept_activations(self.lm, tokens, keep)

    def close(self) -> None:
        """End the thread after the pass that runs. Those that wait are dropped."""
        self.pool.shutdown(cancel_futures=True)


def workers_of(models: Sequence[LanguageModel], lock: Lock) -> list[Worker]:
    """Return a worker for each copy of a language model. They run side by side, on any device.

    On a GPU no thread is needed for that, and one would compete with the training for Python's interpreter lock.

    Args:
        lock: that of the first model, which others may run too.
    """
    if len(models) == 1:
        return [Worker(models[0], lock)]
    locks = [lock, *(Lock() for _ in models[1:])]
    return [worker_beside_others(lm, own) for lm, own in zip(models, locks, strict=True)]


def worker_beside_others(lm: LanguageModel, lock: Lock) -> Worker:
    if lm.device.type != "cuda":
        return ThreadWorker(lm, lock)
    stream = torch.cuda.Stream(lm.device)
    stream.wait_stream(torch.cuda.current_stream(lm.device))  # what was launched before, such as copies of weights
    return Worker(lm, lock, stream)
