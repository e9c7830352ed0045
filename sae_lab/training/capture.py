"""Training steps as CUDA graphs: the kernels of a whole step are recorded once and replayed by one call.

A step launches a hundred kernels from Python, which take longer to launch than to run. In a graph they follow each
other without the host. What changes from step to step lies in tensors at fixed addresses: the batch, the weights, the
optimizer's state, counters and thresholds, the learning rate. What a replay cannot change is the key of a graph: the
batch's shape, the SAE's `plan_step` and the numbers of Python (`numbers_of`). Steps with other keys are captured by
themselves, or taken eagerly if they are rare. A step that replaces numbers or tensors of Python is not captured.
A replayed step is equal, to the bit, to the same step taken eagerly, because both run the same kernels.
"""

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, Literal, Protocol, TypeAlias
from weakref import WeakSet

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lab.ops.matmul import Products
from sae_lab.ops.sparse import HAS_TRITON
from sae_lab.parallel.mesh import world_size
from sae_lab.runtime.errors import SettingError
from sae_lab.saes.base import BaseSAE
from sae_lab.training.micro_batches import MicroBatchStep
from sae_lab.training.python_state import addresses_of, numbers_of, refuse_replacements
from sae_lab.training.step import Splice, StepResult, TrainingStep, Watch

log = logging.getLogger(__name__)

Capture: TypeAlias = Literal["auto"] | bool

WARM = 3
"""Eager steps with a key before it is captured. In the first ones Triton compiles and tunes its kernels and the
optimizer makes its state, which must not be recorded; and a key that is seen less often is not worth a capture."""


MOST = 8
"""Graphs at a time, each of which keeps its batch and its result. One more takes the place of all of them: destroying a
graph frees the workspace of cuBLAS that the other graphs of its stream use (torch 2.12 and later, pytorch#193402)."""

MOST_STEPS = 32
"""SAEs whose steps are captured at a time. torch has so many streams, and the next one would share one, whose workspace
goes where either SAE's graphs are destroyed (see MOST)."""

MOST_SEEN = 1000
"""Keys that are counted at a time."""


class Graph(Protocol):
    """A recorded step. `replay` takes it again on another batch."""

    def replay(self, x: Tensor) -> StepResult: ...


class CudaGraph:
    """A step that is recorded as a CUDA graph. Recording runs no kernel; `replay` takes the step.

    Args:
        run: takes the step on a batch.
        x: a batch of the shape and type of all batches to come.
        pool: memory that is shared with the other graphs of a run. No two of them run at the same time.
        stream: the stream on which all steps of a run are taken.
    """

    def __init__(self, run: Callable[[Tensor], StepResult], x: Tensor, pool: Any, stream: "torch.cuda.Stream"):
        self.x = x.clone()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the prefetch thread may allocate memory meanwhile
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.result = run(self.x)

    def replay(self, x: Tensor) -> StepResult:
        """Take the step on the batch x. The result's tensors are overwritten by the next replay."""
        self.x.copy_(x)
        self.graph.replay()
        return self.result.detach()  # the same memory, without what was derived from an earlier replay (Pattern.rows)


class CapturedStep(TrainingStep):
    """TrainingStep that captures its steps and replays them.

    All steps run on a stream of their own, eager ones too: autograd runs a part of the backward pass on the stream on
    which a parameter was first used, and a capture must not leave its stream.

    Args:
        step: the step to capture.
        required: raise an error if a step cannot be captured, instead of a warning.
        record: makes a graph from `run` and a batch.
    """

    def __init__(
        self,
        step: TrainingStep,
        required: bool = False,
        record: Callable[[Callable[[Tensor], StepResult], Tensor], Graph] | None = None,
    ):
        super().__init__(step.sae, step.optimizer, step.max_grad_norm, step.forward)
        self.products, self.plans = step.products, step.plans
        self.required, self.failed = required, False
        self.graphs: dict[Hashable, Graph] = {}
        self.seen: Counter[Hashable] = Counter()
        self.record = record or self.record_cuda
        self.addresses = list[int]()
        self.device = next(step.sae.parameters()).device
        # Before kernels of the next block's forward passes (activations/interleave.py): the host waits for each step's
        # plan, and for no forward pass.
        self.stream = None if record else torch.cuda.Stream(self.device, priority=-1)
        self.pool: Any = None
        captured.add(self)

    def __call__(
        self, x: Float[Tensor, "b s d"], splice: Splice | None = None, watch: Watch | None = None
    ) -> StepResult:
        assert splice is None  # see why_eager
        if self.stream is None:
            return super().__call__(x, None, watch)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            result = super().__call__(x, None, watch)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return result

    def run(
        self, x: Float[Tensor, "b s d"], plan: Hashable, splice: Splice | None = None, watch: Watch | None = None
    ) -> StepResult:
        parts = [*self.sae.modules()]
        if self.addresses != addresses_of(parts, self.optimizer):  # replaced since the last step
            self.graphs.clear()
            self.seen.clear()
        settings = (self.forward, self.max_grad_norm, self.products, self.row_adam.copied)
        key = (x.shape, x.stride(), x.dtype, settings, numbers_of(parts, self.optimizer), plan)
        self.seen[key] += 1
        if len(self.seen) > MOST_SEEN:
            del self.seen[next(iter(self.seen))]
        warm = self.failed or self.seen[key] <= WARM
        if warm or (key not in self.graphs and not self.try_to_record(key, x, plan)):
            result = super().run(x, plan, None, watch)
            self.addresses = addresses_of(parts, self.optimizer)
            return result
        return self.graphs[key].replay(x).watched_by(watch)

    def try_to_record(self, key: Hashable, x: Tensor, plan: Hashable) -> bool:
        """Record a graph for the key. Returns False, from then on for all keys, if that is impossible here."""
        if len(self.graphs) >= MOST:
            self.graphs.clear()
        try:
            with refuse_replacements([*self.sae.modules()], self.optimizer):
                graph = self.record(lambda batch: super(CapturedStep, self).run(batch, plan).for_the_log(), x)
            self.graphs[key] = graph
        except RuntimeError as e:  # of CUDA, or of a tensor operation that needs the host
            if self.required:
                raise
            self.failed = True
            reason = " ".join(str(first_cause(e)).split())[:300]
            log.warning("training steps are not captured any more, since recording one failed (%s)", reason)
        return not self.failed

    def record_cuda(self, run: Callable[[Tensor], StepResult], x: Tensor) -> Graph:
        """Record a CUDA graph."""
        assert self.stream is not None
        if not self.graphs:  # a pool whose graphs are all destroyed cannot be used again
            if sum(bool(step.graphs) for step in captured) >= MOST_STEPS:
                raise RuntimeError(f"those of {MOST_STEPS} SAEs are, and torch has no more streams")
            self.pool = torch.cuda.graph_pool_handle()
        return CudaGraph(run, x, self.pool, self.stream)


def first_cause(error: BaseException) -> BaseException:
    """Return the error that came first: ending a capture that failed raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return error


captured: WeakSet[CapturedStep] = WeakSet()
"""Those that exist, with graphs or without."""


class PrepareSteps(L.Callback):
    """Calls `prepare_step` when training starts, after a checkpoint is loaded."""

    def __init__(self, capture: Capture, products: Literal["auto"] | Products, micro_batches: int = 1):
        self.capture, self.products, self.micro_batches = capture, products, micro_batches

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step: Any = pl_module.step
        step.row_adam.drop_copies()  # their memory is for the evaluation, as is that of graphs
        if isinstance(step, CapturedStep):
            step.graphs.clear()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        step: Any = module.step
        step.plans.resume(module.foreseen)
        module.foreseen = {}  # if the module is fitted again, it is another state
        step.scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self.micro_batches > 1:
            step = MicroBatchStep(step, self.micro_batches)
        data = trainer.datamodule  # type: ignore[attr-defined]
        pl_module.step = prepare_step(step, self.capture, self.products, data)  # type: ignore[assignment]


def prepare_step(
    step: TrainingStep,
    capture: Capture = "auto",
    products: Literal["auto"] | Products = "auto",
    data: L.LightningDataModule | None = None,
) -> TrainingStep:
    """Return the step in the form for the device that its SAE is on.

    Args:
        step: the step. Its optimizer is prepared in place.
        capture: `auto` captures what can be captured, `true` raises an error where nothing can, `false` never captures.
            Changes no bit.
        products: the precision of float32 products on a GPU; see `choose_products`.
        data: what the batches come from.

    Raises:
        SettingError: `capture` or `products` asks for what is impossible.
    """
    on_gpu = next(step.sae.parameters()).is_cuda
    set_capturable(step.optimizer, on_gpu)
    step.products = choose_products(products, on_gpu, data)
    reason = (why_eager(step) or why_not_captured(step.sae, step.optimizer)) if on_gpu else "there is no GPU"
    if capture is True and reason:
        raise SettingError(f"{{capture}}=true is impossible, since {reason}: give {{capture}}=auto.")
    if capture and not reason:
        return CapturedStep(step, required=capture is True)
    if capture and on_gpu:
        log.info("training steps are not captured, since %s", reason)
    return step


def why_eager(step: TrainingStep) -> str | None:
    """Return why the step cannot be captured, whatever the SAE and the optimizer; None if it can."""
    if step.scaler is not None:
        return "a step in float16 is left out where its gradients overflow"
    return step.why_eager


def choose_products(products: Literal["auto"] | Products, on_gpu: bool, data: L.LightningDataModule | None) -> Products:
    """Return the precision of float32 products in training steps.

    `auto` is high (tf32) on a GPU, as other libraries train, and highest elsewhere. The setting is the whole process's,
    so it would also round the language model's float32 products where a thread computes them at the same time. There,
    `auto` is highest.

    Raises:
        SettingError: a lower precision is asked for where it would round the language model's products, or has no
            effect.
    """
    beside = getattr(data, "float32_forward_in_thread", False)
    if products == "auto":
        chosen: Products = "high" if on_gpu and not beside else "highest"
        if on_gpu:
            log.info("float32 products of training steps: %s%s", chosen, " (tf32)" if chosen == "high" else "")
        return chosen
    if products != "highest" and not on_gpu:
        raise SettingError(f"{{products}}={products} needs a GPU: give {{products}}=auto.")
    if products != "highest" and beside:
        raise SettingError(
            f"{{products}}={products} would also round the products of the language model, which a thread computes at "
            "the same time: give lm.dtype=bfloat16 or data.prefetch=false."
        )
    return products


def why_not_captured(sae: BaseSAE, optimizer: torch.optim.Optimizer) -> str | None:
    """Return why steps on a GPU cannot be captured; None if they can."""
    if world_size() > 1:
        return "several processes exchange numbers whose count depends on the data"
    if not HAS_TRITON:
        return "Triton is not installed"
    if sae.varying_size:
        return sae.varying_size
    if not all(group.get("capturable") for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} has no capturable form"
    return None


def set_capturable(optimizer: torch.optim.Optimizer, on: bool) -> None:
    """Keep what an optimizer reads by the step in tensors on the GPU, or on a CPU as numbers again.

    Called whether or not steps are captured, since the learning rate is rounded to float32 in a tensor. Also called
    after a checkpoint of another device is loaded.
    """
    for group in optimizer.param_groups:
        if "capturable" not in group:
            continue
        group["capturable"], device = on, group["params"][0].device
        lr = float(group["lr"])
        group["lr"] = torch.tensor(lr, device=device) if on else lr
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "step" in state:
                state["step"] = state["step"].to(device)
