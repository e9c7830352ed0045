"""Which layouts there are, which one is chosen, what it holds and what its ranks exchange."""

import pytest
import torch
from conftest import compose

from sae_lab.activations.stream import StreamData
from sae_lab.cache.shards import Manifest
from sae_lab.cache.store import Store
from sae_lab.planning import memory
from sae_lab.planning.asked import with_least_devices
from sae_lab.planning.exchange import all_reduce, exchange
from sae_lab.planning.layouts import Asked, Layout, Option, cheapest, fastest, layouts
from sae_lab.planning.plan import known_models, plan_stream
from sae_lab.planning.sizes import SAESize, read_sizes, sae_size
from sae_lab.runtime.build import build
from sae_lab.runtime.errors import UserError
from sae_lab.training.options import check_options
from sae_lab.training.step import TrainingStep

SAE = SAESize(2 * 64 * 16 + 16, 2 * 64 * 16, 2 * 64 * 16, 0, 64, 16, 16, 16, True, 4)


def planned(*overrides: str):
    return compose(*overrides, config_name="plan")


def plan(*overrides: str):
    return plan_stream("", [planned(*overrides)], known_models())


def test_layouts_divide_the_batch_the_text_and_the_latents():
    found = layouts(4, shares=8, n_latents=6, asked=Asked())
    assert found == [Layout(1, 1), Layout(2, 1), Layout(1, 2), Layout(1, 3), Layout(4, 1), Layout(2, 2)]
    assert layouts(2, 8, 6, Asked(lm=None)) == [Layout(1, 1), Layout(2, 1), Layout(1, 1, 1), Layout(1, 2)]
    assert layouts(9, 8, 6, Asked(ranks=6, lm=3)) == [Layout(2, 3, 3), Layout(1, 6, 3)]
    assert layouts(9, 8, 6, Asked(latents=3)) == [Layout(1, 3), Layout(2, 3)]


def test_layouts_of_very_many_devices_are_few():
    assert 0 < len(layouts(1_000_000, 2**20, 131_072, Asked(lm=None))) < 10_000


def test_a_layout_names_its_settings():
    assert Layout().overrides() == "one process"
    assert Layout(2, 2, 2).overrides() == "trainer=ddp trainer.devices=4 trainer.shard_latents=2 lm.devices=[4,5]"


def test_shards_of_the_latents_leave_the_number_of_devices_open():
    cfg = planned("trainer.shard_latents=2", "gpus=4")
    check_options(with_least_devices(cfg))
    found = plan_stream("", [cfg], known_models()).options
    assert {one.layout[:2] for one in found} == {(1, 2), (2, 2)}
    with pytest.raises(UserError, match=r"must divide trainer.devices=3: give trainer=ddp trainer.devices=2, or a mul"):
        check_options(with_least_devices(planned("trainer.shard_latents=2", "trainer.devices=3")))


def option(n: int, hours: float, size: float) -> Option:
    return Option(Layout(n), {"all": size}, {}, {"step": 1.0}, 1.0, hours)


def test_the_cheapest_that_fits_is_chosen_and_the_faster_of_equals():
    one, two, four = option(1, 8.0, 50), option(2, 4.2, 30), option(4, 3.0, 20)
    assert cheapest([one, two, four]) is two  # 8.4 device-hours in place of 8
    assert cheapest([one, four]) is one
    assert fastest([one, two, four, option(5, 2.8, 20)]) is four


def test_latents_are_sharded_only_where_it_is_clearly_cheaper():
    rows, latents = option(2, 4.0, 30), option(1, 3.8, 30)._replace(layout=Layout(1, 2))
    assert cheapest([rows, latents]) is rows
    assert cheapest([rows, latents._replace(hours=3.0)]).layout == Layout(1, 2)


def test_a_large_dictionary_is_sharded_until_it_fits():
    big = plan("lm=gemma2_2b", "k=64", "n_latents=2_097_152", "n_tokens=4e9", "batch_size=4096", "gpus=8")
    assert big.chosen.layout == Layout(1, 4)  # 84 device-hours, in place of 81 for twice as long
    assert big.chosen.peak <= 0.9 * 141e9
    assert any(option.peak > 0.9 * 141e9 for option in big.options)
    assert big.exchange.candidates == 3 * 4 * 64 * 4096
    assert big.harvest.bytes == 4e9 * 2304 * 2


def test_the_latents_of_a_cross_layer_transcoder_are_sharded():
    """Each reads one of three layers, and x_hat has three of six sites."""
    clt = plan("experiment=cross_layer", "trainer=ddp", "trainer.devices=4", "trainer.shard_latents=2")
    assert clt.chosen.layout == Layout(2, 2)
    [sae] = clt.saes
    assert (sae.read, sae.written, sae.width) == (128, 3 * 128, 6 * 128)
    assert sae.shard(2).parameters == sae.n_latents // 2 * (128 + 3 * 128 + 1) + 3 * 128
    assert clt.exchange.sums == 2 * 4 * 3 * 128 * planned().batch_size / 2


def test_what_fits_nothing_names_the_smallest_layout_that_does():
    with pytest.raises(UserError, match=r"give gpus=2, for 1 x 2 data x latents\.$"):
        plan("lm=gemma2_2b", "k=64", "n_latents=2_097_152", "n_tokens=4e9", "batch_size=4096")
    with pytest.raises(UserError, match="more devices do not change that"):
        plan("lm=gemma2_2b", "n_tokens=4e9", "memory=5e9")


def test_a_number_of_devices_that_is_typed_is_kept():
    chosen = plan("machine=cpu2", "trainer=ddp", "trainer.devices=2", "n_tokens=1_048_576").chosen
    assert chosen.layout == Layout(2)
    assert chosen.peak == 2 * sum(chosen.memory.values())  # of one memory


@pytest.mark.parametrize(
    ("settings", "layout", "overrides"),
    [
        (["gpus=4", "lm=gpt2", "lm.devices=[1,2,3]"], Layout(1, 1, 3), "lm.devices=[1,2,3]"),
        (["lm=gpt2", "lm.devices=[1,cuda:1]"], Layout(1, 1, 1), "lm.devices=[1,cuda:1]"),
        (["machine=cpu2", "lm.devices=[cpu,cpu]"], Layout(), "lm.devices=[cpu,cpu]"),
        (["data=cached", "data.path=none", "lm.devices=[1,2]"], Layout(), "one process"),
        (
            ["trainer=ddp", "trainer.devices=6", "trainer.shard_latents=3", "n_latents=768"],
            Layout(2, 3),
            "trainer=ddp trainer.devices=6 trainer.shard_latents=3",
        ),
    ],
)
def test_layouts_take_the_numbers_that_are_typed(settings, layout, overrides):
    chosen = plan(*settings).chosen
    assert (chosen.layout, chosen.overrides) == (layout, overrides)


SHARDED = ["trainer=ddp", "trainer.devices=2", "trainer.shard_latents=2"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["sae=pursuit", *SHARDED], "PursuitSAE cannot be sharded: give trainer.shard_latents=1"),
        (["machine.memory=[1]"], r"machine.memory=\[1\] must be a number above 0"),
        (["machine.peak=1"], "machine.peak=1 is in the place of a part of the config"),
        (["machine.step=[]"], r"machine.step=\[\] must be a list of measured points"),
        (["machine.forward=[{d: 0}]"], r"machine.forward\[0\].d=0 must be a whole number of at least 1"),
        (["lm_size.d=abc"], "lm_size.d=abc must be null or a whole number of at least 1"),
        (["lm.sites=2"], "lm.sites=2 must be null, a list of strings or a string"),
        (["lm.dtype=auto"], "lm.dtype=auto is not a floating-point dtype"),
        (["data.n_eval_tokens=[0]"], r"data.n_eval_tokens=\[0\] must be a whole number of at least 1"),
        (["n_latents=1023", *SHARDED], "1023, must be a multiple of trainer.shard_latents=2"),
        (["lm=gpt2", "lm.devices=[0,1]"], "lm.devices has 0, which trains as well"),
        (["lm=gpt2", "lm.devices=[cpu]"], "lm.devices has cpu, which is no cuda device"),
        (["lm=gpt2", "lm.device=cuda:1", "gpus=2"], r"not lm.device=cuda:1: give lm.devices=\[1\], or leave it out"),
        (["lm=gpt2", "lm.device_map=auto", "gpus=2"], "lm.device_map=auto splits the language model"),
        (["lm=paired"], r"lm.base.name has no value: give lm.base.name=\.\.\."),
        (["lm=none"], "lm=none is none: choose another lm="),
        (["lm=transformers", "lm.name=tiny"], "lm.sites has no value"),
        (["lm=gpt2", "lm.sites=[transformer.h.40]"], "has transformer.h.40, but the blocks of gpt2 are 0 to 11"),
        (["data=cached"], r"data.path has no value: give data.path=\.\.\."),
        (["memory=1e6"], r"a memory of which 1 MB can be filled"),
        (
            ["lm=gemma2_2b", "n_latents=9_999_991", "n_tokens=4e9"],
            "no number of shards divides n_latents=9999991 well enough: give n_latents=10000384 gpus=8",
        ),
    ],
)
def test_what_cannot_be_had_is_one_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(*settings)


def test_a_harvest_is_as_fast_as_the_slower_of_model_and_disk():
    cpu2 = ["machine=cpu2", "machine.text=1e6", "machine.start_seconds=6", "n_tokens=1_024_000"]
    model = plan(*cpu2, "machine.forward.0.tokens_per_second=60_000").harvest
    assert (model.limit, model.devices) == ("language model", 1)
    assert model.tokens_per_second == pytest.approx(1 / (1 / 60_000 + 1 / 1_000_000), rel=1e-3)
    assert model.hours == pytest.approx((6 + 1_024_000 / model.tokens_per_second) / 3600)
    disk = plan("lm=gpt2", "gpus=8").harvest
    assert (disk.limit, disk.tokens_per_second) == ("cache write", pytest.approx(1.4e9 / 3072))


def test_a_cache_that_is_there_must_have_what_the_run_reads(tmp_path):
    key = {"format": 3, "lm.sites": ["transformer.h.2"], "n_tokens": 2048, "dtype": "float32", "compression": "none"}
    Manifest("tiny", key, True, "").write(Store(tmp_path))
    cached = ["data=cached", f"data.path={tmp_path}"]
    assert plan(*cached).cached
    with pytest.raises(UserError, match="holds activations of tiny, not of gpt2"):
        plan(*cached, "lm=gpt2")
    with pytest.raises(UserError, match=r"not \[transformer.h.3\]: choose lm.sites among these"):
        plan(*cached, "lm.sites=[transformer.h.3]")
    with pytest.raises(UserError, match="holds 2,048 tokens, fewer than n_tokens=2000000"):
        plan(*cached, "data.repeat=false")


def test_an_sae_that_cannot_be_sharded_is_not():
    options = plan("sae=pursuit", "gpus=2", "n_tokens=1_048_576").options
    assert {option.layout.latents for option in options} == {1}


def test_micro_batches_take_less_memory():
    whole, parts = (memory.step_memory(SAE, planned(f"trainer.micro_batches={n}"), Layout()) for n in (1, 4))
    assert parts == whole / 4


@pytest.mark.parametrize(
    ("d", "size"),
    [
        (64, 6 * 512 * 131_072 - 4 * 2 * 64 * 131_072),  # pieces of h, while there are no gradients
        (256, 4 * 2 * 256 * 131_072),  # Adam's two copies of a matrix, beside the gradients
    ],
)
def test_a_cpu_has_no_gradients_while_it_encodes(d, size):
    f, b, k = 131_072, 1024, 16
    sae = SAESize(2 * d * f, 2 * d * f, 0, 0, f, d, d, d, True, k)
    got = memory.step_memory(sae, planned("machine=cpu2", f"batch_size={b}"), Layout())
    assert got == 6 * 4 * b * d + 60 * b * k + size


def test_runs_that_plan_does_not_know_are_refused():
    with pytest.raises(UserError, match="loss=kl_mse runs the language model in every step"):
        plan("loss=kl_mse")
    with pytest.raises(UserError, match="data=tensor has none"):
        plan("data=tensor", "data.path=x.pt")


@pytest.mark.parametrize("name", ["topk", "vanilla"])
def test_parameters_gradients_and_moments_are_counted_to_the_byte(name):
    cfg = planned(f"sae={name}", "machine=cpu2", "expansion=2")
    reading = read_sizes(cfg, known_models())
    sae = build(cfg, "sae", d_in=128, n_latents=256, n_sources=1).train()
    optimizer = torch.optim.Adam(sae.parameters())
    TrainingStep(sae, optimizer)(torch.randn(32, 1, 128))
    parts = memory.process_memory(cfg, reading, [sae_size(cfg, reading)], Layout(), cached=False)

    def size(tensors):
        return sum(t.numel() * t.element_size() for t in tensors)

    assert parts["parameters"] == size([*sae.parameters(), *sae.buffers()])
    assert parts["gradients"] == size(p.grad for p in sae.parameters())
    moments = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    assert parts["optimizer"] == size(moments)
    assert parts["language model"] == 4 * 1_746_944


@pytest.mark.parametrize("settings", [[], ["data.prefetch=true"], ["n_tokens=3000", "batch_size=1000"]])
def test_a_block_is_as_large_as_the_stream_makes_it(settings):
    cfg = planned("machine=cpu2", *settings)
    stream = {key: cfg.data[key] for key in ("batch_size", "n_tokens", "block_tokens", "prefetch", "repeat", "seed")}
    body = dict.fromkeys(StreamData.__abstractmethods__) | {"sites": ("a",), "d_in": 128, "dtype": torch.float32}
    made = type("Data", (StreamData,), body)(torch.device("cpu"), **stream, n_eval_tokens=1, n_val_tokens=1)
    held = made.block_bytes * (1 + made.prefetch)
    assert memory.block_memory(cfg, read_sizes(cfg, known_models()), Layout()) == held
    assert memory.block_memory(cfg, read_sizes(cfg, known_models()), Layout(2)) == held / 2


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_ring_sends_what_the_formula_says(n):
    """Each rank passes n - 1 parts on to be summed, and n - 1 sums."""
    sent, parts = [0] * n, 24 * n
    for _ in range(2):
        for _ in range(n - 1):
            for rank in range(n):
                sent[rank] += parts // n
    assert set(sent) == {all_reduce(n, parts)}


def test_ranks_exchange_gradients_candidates_sums_and_rows():
    assert exchange(SAE, 32, 1, 1, 64, False).bytes == 0
    data = exchange(SAE, 32, 2, 1, 64, False)
    assert (data.gradients, data.candidates, data.sums) == (4 * SAE.parameters + 64, 0, 0)
    assert data.activations == 16 * 64 / 2
    latents = exchange(SAE, 32, 1, 2, 64, False)
    assert (latents.gradients, latents.candidates, latents.sums) == (0, 4 * 4 * 32, 2 * 4 * 32 * 16)
    assert exchange(SAE, 32, 1, 1, 64, True).activations == 32 * 64
    assert data.seconds(1e6, 1e-3) == pytest.approx(data.bytes / 1e6 + data.operations * 1e-3)
