"""Copies of a language model on devices of their own: the activations of one, refusals, errors and ends."""

import threading
from functools import partial
from typing import Any

import pytest
import torch
from conftest import compose, equal
from fakes import SETTINGS, Numbers
from groups import assert_same_run, config, stop_at_batch
from torch import nn

from sae_lab.activations.buffer import ShuffledBlocks
from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.activations.interleave import InterleavedSource
from sae_lab.activations.source import SharedSource
from sae_lab.activations.workers import ThreadWorker, kept_activations
from sae_lab.lm import TransformersLM
from sae_lab.lm.base import LanguageModel
from sae_lab.lm.devices import copy_to, device_names, devices_of_rank
from sae_lab.runtime.build import build
from sae_lab.runtime.errors import SafeStop, SettingError, UserError
from sae_lab.training.run import train_run

SITES = ["transformer.h.1", "transformer.h.3.input"]
SIZES = {"n_tokens": 200, "block_tokens": 64, "seq_len": 16, "batch_size": 8, "exclude_bos": True}


@pytest.fixture(scope="module")
def tiny() -> TransformersLM:
    return TransformersLM("tiny", SITES, device="cpu")


def on_devices(lm: Any, *devices: str) -> Any:
    lm = lm.with_sites(lm.sites)
    lm.devices = devices
    return lm


def data(lm: Any, **changes: Any) -> ActivationData:
    documents = partial(Numbers, n_documents=20)
    return from_documents(lm, documents, order="shuffled", **(SETTINGS | SIZES | changes))


def batches_of(d: ActivationData) -> list[torch.Tensor]:
    try:
        return list(d.train_dataloader())
    finally:
        d.stream.close()


@pytest.mark.parametrize("pairs", [False, True])
def test_several_copies_give_the_batches_of_one(tiny, pairs):
    alone = data(tiny).with_previous() if pairs else data(tiny)
    expected = batches_of(alone)
    for way in ("none ahead", "in a thread", "between steps"):  # the last one is that of GPUs
        d = data(on_devices(tiny, "cpu", "cpu", "cpu"), prefetch=way == "in a thread")
        d = d.with_previous() if pairs else d
        if way == "between steps":
            ahead = InterleavedSource(d.source(), d.lm.device)
            d.stream = ShuffledBlocks(SharedSource(ahead), 64, 8, d.seed, d.n_tokens, ahead.prepare)
        assert equal(batches_of(d), expected)
        d.load_state_dict(alone.state_dict())
        assert d.state_dict() == alone.state_dict()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lm")]


def test_copies_work_side_by_side_in_turn(tiny, monkeypatch):
    """Each of two waits for the other, which would never come in one thread."""
    barrier, ran, compute = threading.Barrier(2), [], LanguageModel.activations

    def together(self, tokens):
        ran.append(id(self.model))
        barrier.wait()
        return compute(self, tokens)

    d = data(on_devices(tiny, "cpu", "cpu"), n_tokens=64)
    monkeypatch.setattr(LanguageModel, "activations", together)
    [*map(next, [iter(d.train_dataloader())] * 8)]
    barrier.abort()
    d.stream.close()
    assert len(set(ran)) == 2
    assert all({*ran[i : i + 2]} == {*ran} for i in range(0, len(ran), 2))


def test_an_error_in_a_thread_ends_the_stream_where_its_chunk_would_be(tiny, monkeypatch):
    alone, compute, text = batches_of(data(tiny)), ThreadWorker._run, data(tiny).rows()
    text.skip(8)
    fifth = text.take(2)

    def failing(self, tokens, keep):
        if torch.equal(tokens, fifth):
            raise UserError("the GPU fell off the bus.")
        return compute(self, tokens, keep)

    monkeypatch.setattr(ThreadWorker, "_run", failing)
    d, got = data(on_devices(tiny, "cpu", "cpu"), prefetch=True), []
    with pytest.raises(UserError, match="fell off the bus"):
        got.extend(d.train_dataloader())
    d.stream.close()
    assert equal(got, alone[: len(got)])
    assert len(got) == 8  # of the first block: the second one needs the fifth pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lm")]


def test_a_copy_shares_weights_on_its_own_device_and_nothing_else(tiny):
    copied = tiny.run_by(copy_to(tiny.model, "cpu"))
    tokens = torch.randint(0, 100, (2, 8))
    assert torch.equal(copied.activations(tokens), tiny.activations(tokens))
    ours, theirs = (dict(lm.model.named_parameters()) for lm in (tiny, copied))
    assert ours.keys() == theirs.keys()
    assert all(ours[name] is not theirs[name] and ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    assert copied.model.transformer.wte.weight is copied.model.lm_head.weight  # still tied
    assert not any(p.requires_grad for p in copied.model.parameters())
    with copied.hooked({SITES[0]: lambda x: torch.zeros_like(x)}):
        assert torch.equal(tiny.activations(tokens), kept_activations(tiny, tokens, tokens > -1).view(2, 8, 2, -1))


def test_a_pair_is_copied_as_a_pair():
    both = ["lm=paired", "lm.base.name=tiny", "lm.tuned.name=tiny", "lm.base.sites=[transformer.h.1]"]
    pair = build(compose(*both, "lm.devices=[cpu,cpu]"), "lm")
    [copied] = pair.copies()
    tokens = torch.randint(0, 100, (2, 8))
    assert torch.equal(copied.activations(tokens), pair.activations(tokens))
    assert copied.pair["tuned"].model is copied.model["tuned"] is not pair.model["tuned"]
    apart = build(compose(*both, "lm.device=null"), "lm")
    assert torch.equal(apart.activations(tokens), pair.activations(tokens))


def test_quantised_weights_are_not_copied():
    class Quantised(nn.Parameter):
        pass

    module = nn.Linear(2, 2)
    module.weight = Quantised(torch.ones(2, 2))
    with pytest.raises(UserError, match="quantised weights cannot be"):
        copy_to(module, "cpu")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lm.devices=[]"], r"lm\.devices"),
        (["lm.devices=cpu"], r"lm\.devices=.*must be a list of GPUs or devices, such as"),
        (["lm.devices=[gpu0]"], r"lm\.devices has gpu0, which is no device"),
        (["lm.devices=[64]"], r"lm\.devices has 64, but torch finds .*: give others, or leave it out"),
        (["lm.devices=[cpu]", "lm.device=cpu"], r"lm\.device=cpu and lm\.devices=.*cpu.* both place the model"),
        (["lm.devices=[cpu]", "lm.device_map=auto"], r"lm\.device_map=auto and lm\.devices=.* both place the model"),
    ],
)
def test_devices_that_cannot_be_are_refused(overrides, words):
    with pytest.raises(SettingError, match=words):
        build(compose(*overrides), "lm")


def test_each_rank_has_devices_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    names = device_names([4, "5", "cuda:6", 7])
    assert names == ("cuda:4", "cuda:5", "cuda:6", "cuda:7")
    for n, given in ((1, [names]), (2, [names[::2], names[1::2]]), (8, [(name,) for name in 2 * names])):
        monkeypatch.setattr("sae_lab.lm.devices.world_size", lambda n=n: n)
        for i in range(n):
            monkeypatch.setattr("sae_lab.lm.devices.rank", lambda i=i: i)
            assert devices_of_rank(names) == given[i]


def test_a_run_with_copies_stops_and_goes_on_without(tmp_path, monkeypatch):
    train_run(config(tmp_path / "whole", "sae=topk"))
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 8)
        with pytest.raises(SafeStop, match="at step 7 of 12"):
            train_run(config(tmp_path / "run", "sae=topk", "lm.devices=[cpu,cpu]", "data.prefetch=true"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("lm", "prefetch"))]
    train_run(config(tmp_path / "run", "sae=topk"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")
