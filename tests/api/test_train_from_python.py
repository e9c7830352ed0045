"""Runs from Python are the runs of the command, to the bit: alone, in a group, stopped and continued."""

import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import compose as compose_cfg
from conftest import planted
from groups import assert_same_run, stop_at_batch

from sae_lab import (
    Activations,
    BatchTopKSAE,
    JumpReLUSAE,
    TemporalSAE,
    TopKSAE,
    calibrate,
    load_run,
    load_sae,
    train_sae,
    train_sae_group,
    training_step,
)
from sae_lab.runtime.errors import SafeStop, UserError
from sae_lab.training.run import train_run

STEPS, BATCH = 12, 128
SMALL = [
    "data.block_tokens=512",
    "data.n_eval_tokens=280",
    "data.n_val_tokens=128",
    "calibration_batches=3",
    "trainer.validate_every=5",
    "trainer.checkpoint_every=4",
    "trainer.log_every=3",
]
X = planted(4000)[0][:, 0].clone()


def batch_topk(**changes) -> BatchTopKSAE:
    return BatchTopKSAE(**({"k": 3, "d_in": 16, "n_latents": 32} | changes))


def train(sae, folder: Path, x=X, **changes):
    return train_sae(sae, x, STEPS * BATCH, batch_size=BATCH, run_dir=folder, overrides=SMALL, **changes)


@pytest.fixture(scope="module")
def by_command(tmp_path_factory) -> Path:
    """The run of the command on a file of the same rows."""
    folder = tmp_path_factory.mktemp("by_command")
    torch.save(X, folder.parent / "acts.pt")
    sizes = ["k=3", "n_latents=32", f"n_tokens={STEPS * BATCH}", f"batch_size={BATCH}"]
    data = ["data=tensor", f"data.path={folder.parent / 'acts.pt'}"]
    train_run(compose_cfg(*data, *sizes, *SMALL, f"run_dir={folder}"))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(batch_topk(), tmp_path_factory.mktemp("trained") / "run")


def test_six_lines_give_the_run_of_the_command(by_command, trained):
    assert trained.metrics == json.loads((by_command / "metrics.json").read_text())
    for file in ("metrics.json", "sae/sae.safetensors", "figures/l0_per_token.csv"):
        assert (trained.folder / file).read_bytes() == (by_command / file).read_bytes(), file
    torch.testing.assert_close(trained.sae.W_dec.flatten(1).norm(dim=1), torch.ones(32))
    assert trained.sae.threshold == load_sae(by_command).threshold > 0
    assert not trained.sae.training
    assert repr(trained).startswith("TrainedRun(fvu=")


def test_a_stopped_run_continues_to_the_same_bits(by_command, tmp_path, monkeypatch):
    sae = batch_topk()
    with monkeypatch.context() as patch:
        stop_at_batch(patch, 7, signal.SIGINT)
        with pytest.raises(SafeStop, match="at step 6 of 12"):
            train(sae, tmp_path)
    again = train(sae, tmp_path)
    assert (again.folder / "sae/sae.safetensors").read_bytes() == (by_command / "sae/sae.safetensors").read_bytes()
    assert (again.folder / "metrics.json").read_bytes() == (by_command / "metrics.json").read_bytes()


def test_a_complete_run_is_read_into_a_new_sae(trained):
    sae = batch_topk()
    again = train(sae, trained.folder)
    assert again.metrics == trained.metrics
    assert torch.equal(sae.W_dec, trained.sae.W_dec)
    with pytest.raises(UserError, match=r"another config \(k is 3"):
        train(batch_topk(k=2), trained.folder)


def test_a_complete_run_of_other_data_is_refused(trained):
    other = X.clone()
    other[-1, 0] += 1
    before = trained.sae.W_dec.clone()
    sae = batch_topk()
    with pytest.raises(UserError, match="the activations changed since this run began"):
        train(sae, trained.folder, other)
    options = {"batch_size": BATCH, "overrides": SMALL, "run_dir": trained.folder.parent}
    with pytest.raises(UserError, match="the activations changed since this run began"):
        train_sae_group({trained.folder.name: sae}, other, STEPS * BATCH, **options)
    assert not torch.equal(sae.W_dec, before)


def test_a_group_gets_the_bits_of_each_alone(trained, tmp_path):
    members = {"batch": batch_topk(), "topk": TopKSAE(k=3, d_in=16, n_latents=32, seed=1)}
    options = {"batch_size": BATCH, "overrides": SMALL}
    runs = train_sae_group(members, X, STEPS * BATCH, run_dir=tmp_path, **options)
    assert [run.folder.name for run in runs] == ["batch", "topk"]
    assert_same_run(trained.folder, runs[0].folder)
    assert runs[1].metrics["l0"] == pytest.approx(3, abs=0.1)
    with pytest.raises(UserError, match="pairs of rows"):
        train_sae_group([TemporalSAE(k=3, d_in=16, n_latents=32)], X)
    again = train_sae_group(members, X, STEPS * BATCH, run_dir=tmp_path, **options)
    assert [run.metrics for run in again] == [run.metrics for run in runs]


def test_the_weights_that_a_run_starts_from_are_part_of_its_config(trained, tmp_path):
    """Trained further, an SAE is not the one of its seed, and its run folder says so."""
    further = train(load_sae(trained.folder).train(), tmp_path)
    assert "init_from: weights with digest" in (further.folder / ".hydra" / "config.yaml").read_text()
    assert further.metrics["fvu"] < trained.metrics["fvu"]


def test_commands_open_a_run_of_a_tensor_once_it_is_a_file(trained, by_command):
    with pytest.raises(UserError, match=r"data.path=null.: save it with torch.save"):
        load_run(trained.folder)
    sae, data, _ = load_run(trained.folder, replace={"data.path": str(by_command.parent / "acts.pt")})
    assert data.n_sources == sae.n_sources == 1


def test_a_member_that_fails_leaves_the_others_their_results(tmp_path):
    bad = batch_topk()
    with torch.no_grad():
        bad.W_enc.mul_(1e30)
    options = {"batch_size": BATCH, "overrides": SMALL, "run_dir": tmp_path}
    with pytest.raises(UserError, match=r"1 of 2 SAEs failed: see .*bad/failed\.txt"):
        train_sae_group({"bad": bad, "good": batch_topk()}, X, STEPS * BATCH, **options)
    assert (tmp_path / "good" / "metrics.json").is_file()
    assert not (tmp_path / "bad" / "metrics.json").exists()


@pytest.mark.parametrize("make", [batch_topk, lambda: JumpReLUSAE(k=3, d_in=16, n_latents=32)])
def test_a_loop_of_ones_own_keeps_the_constraints(make):
    sae, activations = make(), Activations.from_tensor(X)
    cfg = activations.config("batch_size=128", "n_tokens=1536")
    data = activations.data(cfg)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    stream = data.new_stream()
    losses = [training_step(sae, optimizer, next(stream)).loss.item() for _ in range(12)]
    assert losses[-1] < losses[0]
    torch.testing.assert_close(sae.W_dec.flatten(1).norm(dim=1), torch.ones(32))
    running = getattr(sae, "threshold", torch.zeros(())).clone()
    calibrate(sae, data.calibration_batches(3))
    assert not sae.training
    assert not hasattr(sae, "threshold") or sae.threshold != running


def test_a_tensor_calibrates_as_one_batch():
    one, listed = batch_topk(), batch_topk()
    calibrate(one, X)
    calibrate(listed, [X.numpy()])
    assert one.threshold == listed.threshold > 0


def test_arrays_are_taken_as_tensors_are(trained):
    again = train(batch_topk(), trained.folder, X.numpy())  # read: the rows are the same
    assert again.metrics == trained.metrics
    assert torch.equal(next(iter(Activations.from_tensor(X.numpy()))), next(iter(Activations.from_tensor(X))))


def test_iterating_gives_the_batches_of_training():
    activations = Activations.from_tensor(X, block_tokens=2048)
    first = next(iter(activations))
    assert torch.equal(first, next(iter(activations.data().train_dataloader())))
    assert first.shape == (1024, 1, 16)
    assert not torch.equal(first[:, 0], X[:1024])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: train(batch_topk(d_in=8), f), r"must have the shape .* or \(..., 8\)"),
        (
            lambda f: train(batch_topk(d_in=8), f, Activations.from_tensor(X)),
            "takes activations of width 8 at 1 site,",
        ),
        (lambda f: train_sae(batch_topk(), X, overrides=["trainer.devices=2"]), "trains in one process"),
        (lambda f: train_sae(batch_topk(), X, overrides=["no_such=1"]), "no_such"),
        (lambda f: train_sae(batch_topk(), X, lr=-1.0), "optimizer.lr=-1.0 must be a number above 0"),
        (lambda f: Activations.from_tensor(X, block=1).config(), "block is no setting of data=tensor"),
        (lambda f: train_sae(batch_topk(), X, overrides=["k=4"]), "k=4 has no effect on the SAE that you give"),
        (lambda f: train_sae(batch_topk(), X, overrides=["sae=topk"]), "sae=topk has no effect on the SAE"),
        (lambda f: train_sae(batch_topk(), X, overrides=["data=stdlib"]), "no effect on the activations that"),
        (lambda f: train_sae(batch_topk(), X, overrides="seed=1"), "overrides=seed=1 must be a list of strings"),
        (lambda f: train_sae(BatchTopKSAE, X), "sae must be a BaseSAE, not the class BatchTopKSAE"),
        (lambda f: train_sae(torch.nn.Linear(2, 2), X), "sae must be a BaseSAE, not a Linear"),
        (lambda f: train_sae(batch_topk(), [1, 2]), r"activations must be .* or a ndarray, not \[1,2\]"),
        (lambda f: train_sae_group([], X), "saes is empty: give at least one SAE"),
        (lambda f: train_sae_group(batch_topk(), X), "saes must be a list of BaseSAE or a Mapping of BaseSAE, not a B"),
        (lambda f: train_sae_group([BatchTopKSAE], X), "saes must be a list of BaseSAE"),
        (lambda f: calibrate(batch_topk(), []), "batches is empty"),
        (lambda f: calibrate(batch_topk(), X[:0]), "batch 0 has no rows"),
        (lambda f: train_sae_group([(sae := batch_topk()), sae], X), "twice in the group"),
    ],
)
def test_mistakes_are_told_in_one_sentence(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(tmp_path / "run")
