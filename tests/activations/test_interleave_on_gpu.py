"""What a GPU does that a CPU cannot: forward passes on a stream of their own, beside training steps."""

from functools import partial

import pytest
import torch
from fakes import SETTINGS, Numbers
from shell import run
from small_runs import SMALL

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.activations.interleave import InterleavedSource
from sae_lab.activations.passes import GPU_TOKENS, peak_of_one_row, rows_per_pass
from sae_lab.lm import TransformersLM
from sae_lab.runtime.errors import UserError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
SIZE = {"n_tokens": 20_000, "block_tokens": 4096, "seq_len": 64, "batch_size": 256, "lm_batch_rows": 16}


def data(lm: TransformersLM, **changes) -> ActivationData:
    return from_documents(lm, partial(Numbers, n_documents=200), order="shuffled", **(SETTINGS | SIZE | changes))


@pytest.fixture(scope="module", params=[0, pytest.param(1, marks=needs_two)], ids=["one GPU", "second GPU"])
def lm(request) -> TransformersLM:
    return TransformersLM("tiny", ["transformer.h.2"], device=f"cuda:{request.param}")


@pytest.mark.parametrize("changes", [{}, {"exclude_bos": True}], ids=["all", "without BOS"])
def test_batches_are_the_same_beside_other_work_on_the_gpu(lm, changes):
    """Some of the other work frees memory that the next pass may get."""
    expected = list(data(lm, **changes).train_dataloader())
    d = data(lm, prefetch=True, **changes)
    assert isinstance(d.stream.source.source, InterleavedSource)
    weight = torch.randn(2048, 2048, device="cuda:0")
    for batch, other in zip(d.train_dataloader(), expected, strict=True):
        for _ in range(10):
            weight = weight @ weight * 0.01
        assert torch.equal(batch.to("cuda:0", non_blocking=True), other.to("cuda:0"))
    d.stream.close()


def test_a_pass_is_launched_without_a_wait_for_the_gpu(lm):
    d = data(lm, prefetch=True, exclude_bos=True)
    ahead = d.read_ahead(d.source())
    chunks = iter(ahead)
    next(chunks)  # loads kernels and makes pinned memory
    ahead.prepare(3000, 3000)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ahead.prepare(6000, 6000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    chunks.close()


def test_activations_that_are_not_finite_never_reach_a_batch():
    lm = TransformersLM("tiny", ["transformer.h.2"], device="cuda")
    d = data(lm, prefetch=True)
    next(d.stream)
    lm.model.transformer.wte.weight.data[:, 0] = torch.nan
    got = []
    with pytest.raises(UserError, match=r"activations of transformer\.h\.2 are not finite"):
        got.extend(d.stream)
    assert all(batch.isfinite().all() for batch in got)


def test_a_small_model_takes_whole_passes(lm):
    assert 0 < peak_of_one_row(lm, 128) == peak_of_one_row(lm, 128)
    assert rows_per_pass(lm, 128, None, "auto") == GPU_TOKENS // 128


@pytest.fixture(scope="module")
def sequential(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interleave") / "sequential"
    done = run(*SMALL, "data.prefetch=false", f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.process
@pytest.mark.parametrize("device", ["cuda", pytest.param("cuda:1", marks=needs_two)])
def test_a_run_ends_with_the_same_bits(sequential, device, tmp_path):
    done = run(*SMALL, "data.prefetch=true", f"lm.device={device}", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    for file in ("metrics.json", "sae/sae.safetensors"):
        assert (tmp_path / file).read_bytes() == (sequential / file).read_bytes(), file
