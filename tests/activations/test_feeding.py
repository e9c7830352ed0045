"""Many ranks: each reads, computes and holds its own part, and the batches are those of one process."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import build, equal
from fakes import SETTINGS, Echo, Follow, Numbers, UniqueWords
from ranks import Call, start_ranks

from sae_lab.activations.data import ActivationData
from sae_lab.activations.from_text import from_documents
from sae_lab.activations.stream import StreamData
from sae_lab.activations.tensor import TensorData
from sae_lab.cache.data import CachedData
from sae_lab.cache.reader import Cache
from sae_lab.cache.writer import CacheWriter
from sae_lab.lm import TransformersLM
from sae_lab.lm.none import NoLM
from sae_lab.parallel.mesh import data_axis, rank, sharded_latents
from sae_lab.runtime.errors import SettingError
from sae_lab.text.store import TokenStore
from sae_lab.training.splice_loss import SpliceLoss
from sae_lab.training.step import TrainingStep

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Call]]:
    with start_ranks(2) as two, start_ranks(4) as four:
        yield {1: lambda f, *arguments: [f(*arguments)], 2: two, 4: four}


SIZES: dict[str, Any] = {"batch_size": 8, "block_tokens": 64, "n_tokens": 300, "seq_len": 8, "lm_batch_rows": 2}


def words(**changes: Any) -> ActivationData:
    documents = partial(Numbers, n_documents=40) if changes.pop("streamed", False) else UniqueWords
    settings = SETTINGS | SIZES | changes
    return from_documents(Echo(), documents, **({"order": "shuffled"} | settings))


def cached(folder: str, **changes: Any) -> CachedData:
    return CachedData(Follow(), folder, **(SETTINGS | SIZES | {"lm_batch_rows": 32} | changes))


def tensor(file: str, **changes: Any) -> TensorData:
    names = ("prefetch", "repeat", "seed", "n_eval_tokens", "n_val_tokens", "batch_size", "block_tokens", "n_tokens")
    settings = {name: (SETTINGS | SIZES)[name] for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sae_lab.activations.tensor.CHUNK_BYTES", 5 * 12 * 8 * 4)  # five pieces of twelve rows
        return TensorData(NoLM("cpu"), file, key=None, axes="auto", held_out_every=10, **(settings | changes))


class Traffic:
    """Counts the rows or pieces that are read of a store, and the bytes that an exchange sends to other ranks."""

    def __init__(self) -> None:
        self.read = self.sent = 0
        self.exchange, self.patch = dist.all_to_all_single, pytest.MonkeyPatch()

    def __enter__(self) -> "Traffic":
        for store, name in ((TokenStore, "read"), (Cache, "pieces"), (TensorData, "read")):
            self.count(store, name)

        def exchange(into: Any, rows: Any, n_received: Any, sizes: Any, group: Any) -> None:
            own = rank() if group is None else dist.get_group_rank(group, rank())
            self.sent += (len(rows) - sizes[own]) * rows.shape[1]
            self.exchange(into, rows, n_received, sizes, group)

        self.patch.setattr(dist, "all_to_all_single", exchange)
        return self

    def count(self, store: type, name: str) -> None:
        read = getattr(store, name)

        def counting(of: Any, numbers: Any, *rest: Any) -> Any:
            self.read += len(numbers)
            return read(of, numbers, *rest)

        self.patch.setattr(store, name, counting)

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()


def draw(
    state: dict | None, n: int, changes: dict, m: int = 1, make: Callable[..., StreamData] = words
) -> dict[str, Any]:
    """The next n batches of a stream on this rank, where it then stands, and what that took."""
    with sharded_latents(m), Traffic() as traffic:
        d = make(**changes)
        if state is not None:
            d.load_state_dict(state)
        traffic.read = 0
        batches = [batch for _, batch in zip(range(n), d.train_dataloader(), strict=False)]
        state, memory = d.state_dict(), d.stream._block._memory
        read, place = traffic.read, data_axis().index
        d.stream.close()
    took = {"read": read, "sent": traffic.sent, "held": len(memory)}
    return {"batches": batches, "state": state, "place": place} | took


def joined(given: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The batches of all ranks; those that hold the same share must agree."""
    parts: dict[int, list[torch.Tensor]] = {}
    for of_rank in given:
        assert equal(parts.setdefault(of_rank["place"], of_rank["batches"]), of_rank["batches"])
    return [torch.cat(shares) for shares in zip(*(parts[i] for i in sorted(parts)), strict=True)]


CASES: dict[str, dict[str, Any]] = {
    "store": {},
    "positions left out": {"exclude_bos": True, "exclude_tokens": [0]},
    "long rows left out": {"max_norm": 1.2},
    "the text ends in a block": {"repeat": False, "n_tokens": 100_000},
    "the last batch is cut": {"n_tokens": 308},
    "prefetched": {"prefetch": True},
    "as read": {"order": "as_read"},
    "windows": {"streamed": True},
    "several passes": {"n_tokens": 1600},
    "several passes over windows": {"streamed": True, "n_tokens": 1600},
    "windows, the text ends": {"streamed": True, "repeat": False, "n_tokens": 100_000, "exclude_bos": True},
}


@pytest.mark.parametrize("case", CASES)
def test_the_batches_are_those_of_one_process_to_the_bit(ranks, case):
    [alone] = ranks[1](draw, None, 10_000, CASES[case])
    assert len(alone["batches"]) > 10
    for n, m in ((2, 1), (4, 1), (4, 2)):
        whole = joined(ranks[n](draw, None, 10_000, CASES[case], m))
        ended = n // m * (len(alone["batches"][-1]) // (n // m))
        assert equal(whole, [*alone["batches"][:-1], alone["batches"][-1][:ended]][: len(whole)])
        assert len(whole) == len(alone["batches"]) - (ended == 0)


@pytest.mark.parametrize("case", ["store", "positions left out", "windows"])
def test_a_stream_goes_on_with_another_number_of_ranks(ranks, case):
    """In the middle of a block, from one to four, to two, to one."""
    [alone] = ranks[1](draw, None, 23, CASES[case])
    got, state = list[torch.Tensor](), None
    for n, n_batches in ((1, 5), (4, 6), (2, 9), (1, 3)):
        given = ranks[n](draw, state, n_batches, CASES[case])
        state = given[0]["state"]
        assert all(equal(state, of_rank["state"]) for of_rank in given)
        got += joined(given)
    assert equal(got, alone["batches"])


def test_a_rank_reads_holds_and_gets_its_own_part(ranks):
    """Two blocks of 64 rows: eight chunks of 2 text rows each, of 16 rows of 16 bytes."""
    took = {n: ranks[n](draw, None, 16, {}) for n in (1, 2, 4)}
    for n in (1, 2, 4):
        assert [of_rank["read"] for of_rank in took[n]] == [16 // n] * n
        assert [of_rank["held"] for of_rank in took[n]] == [64 // n] * n
        # A broadcast sends (n - 1)·128 rows in all; here each row goes to one rank, which may have it already.
        sent = sum(of_rank["sent"] for of_rank in took[n])
        assert sent <= 128 * 16 * (n - 1) / n * 1.25
        assert (sent > 0) == (n > 1)


def test_a_rank_reads_its_own_part_of_files(ranks, tmp_path):
    """Of a cache and of a tensor: chunks of two pieces of 128 rows and of five of 12."""
    documents = partial(UniqueWords, n_documents=400)
    text = from_documents(Follow(), documents, order="shuffled", **(SETTINGS | SIZES | {"lm_batch_rows": 32}))
    CacheWriter(text, str(tmp_path / "cache"), n_tokens=3000, shard_tokens=1000).build()
    torch.save(torch.randn(1200, 8, generator=torch.Generator().manual_seed(0)), tmp_path / "x.pt")
    for make, name in ((cached, "cache"), (tensor, "x.pt")):
        made, settings = partial(make, str(tmp_path / name)), {"n_tokens": 4000, "block_tokens": 1024}
        [alone] = ranks[1](draw, None, 10_000, settings, 1, made)
        assert len(alone["batches"]) == 500
        for n in (2, 4):
            took = ranks[n](draw, None, 10_000, settings, 1, made)
            assert equal(joined(took), alone["batches"])
            assert max(of_rank["read"] for of_rank in took) <= alone["read"] / n + 5


def copies(devices: list[str], **changes: Any) -> ActivationData:
    lm = TransformersLM("tiny", ["transformer.h.1"], device="cpu")
    lm.devices = tuple(devices)
    settings = SETTINGS | SIZES | {"seq_len": 16} | changes
    return from_documents(lm, partial(Numbers, n_documents=40), order="shuffled", **settings)


def test_copies_of_the_language_model_beside_ranks(ranks):
    """Four devices for two ranks: two threads in each, whose activations go through the same exchange."""
    [alone] = ranks[1](draw, None, 20, {}, 1, partial(copies, []))
    for devices, prefetch in ((4, False), (4, True), (1, False)):
        made = partial(copies, ["cpu"] * devices, prefetch=prefetch)
        assert equal(joined(ranks[2](draw, None, 20, {}, 1, made)), alone["batches"])


# --- batches of whole text rows


def trained_on_rows(exclude_bos: bool = False) -> tuple[dict[str, torch.Tensor], int]:
    """A short training with the language model in the loss, and the positions that this rank has seen."""
    d = copies([], seq_len=8, batch_size=32, n_tokens=160, exclude_bos=exclude_bos).in_whole_rows()
    batches = list(d.train_dataloader())
    sae, loss = build("topk", "k=4", d_in=d.d_in, n_latents=32).train(), SpliceLoss(d.lm, 1)
    step = TrainingStep(sae, torch.optim.SGD(sae.parameters(), lr=0.1))
    for batch in batches:
        step(batch.x, partial(loss, batch=batch))
    return sae.state_dict(), sum(map(len, batches))


def test_whole_rows_are_shared_out(ranks):
    [(alone, n)] = ranks[1](trained_on_rows)
    (first, of_first), (second, of_second) = ranks[2](trained_on_rows)
    assert (n, of_first, of_second) == (160, 80, 80)
    assert equal(first, second)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5)
    with pytest.raises(SettingError, match="leave processes with different numbers of positions"):
        ranks[2](trained_on_rows, True)
