"""Bad numbers in activations: a run ends in finite metrics, with those left out named, or in one sentence."""

import json
import logging
import math
from functools import cache, partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import SAE_NAMES, build, compose, planted
from fakes import SETTINGS, Numbers, WordIds

from sae_lab import plots
from sae_lab.activations.data import ActivationData
from sae_lab.activations.finite import check_finite
from sae_lab.activations.from_text import from_documents
from sae_lab.cache.reader import Cache, CachedSource
from sae_lab.cache.writer import CacheWriter
from sae_lab.evaluation.calibration import calibrate
from sae_lab.evaluation.evaluator import Evaluation, evaluate
from sae_lab.evaluation.findings import find_problems, find_too_few_steps, numbers
from sae_lab.lm.predictions import PredictionsOfRows
from sae_lab.runs import provenance
from sae_lab.runs.results import write_metrics, write_results
from sae_lab.runtime.build import build as build_node
from sae_lab.runtime.errors import UserError
from sae_lab.runtime.files import write_json
from sae_lab.saes.batch_topk import BatchTopKSAE
from sae_lab.saes.files import save_sae
from sae_lab.sweeps import shared_stream
from sae_lab.sweeps.status import read_status
from sae_lab.sweeps.table import collect_table, complete_jobs
from sae_lab.training import run
from sae_lab.training.step import TrainingStep


class Words(WordIds):
    name_or_path = "words"

    def __len__(self) -> int:
        return 2000


class BadLM:
    """A language model with random activations at two sites, which `change` makes bad."""

    name, sites, bos_id, context, models, vocab_size = "bad", ("a", "b"), 0, 200, (), 2000
    device, dtype, tokenizer, is_split = torch.device("cpu"), torch.float32, Words(), False

    def __init__(self, change, d: int = 8):
        generator = torch.Generator().manual_seed(0)
        self.change, self.d = change, d
        self.table = torch.randn(2000, 2, d, generator=generator)
        self.model = torch.nn.ParameterDict({"unembedding": torch.randn(d, 2000, generator=generator)})

    def with_sites(self, sites):
        assert tuple(sites) == self.sites
        return self

    def copies(self):
        return []

    def activations(self, tokens):
        return self.change(self.table[tokens])

    def predictions(self, tokens, replace=None, where=None):
        return PredictionsOfRows(self, tokens, replace, where)

    def logits(self, tokens, replace=None, where=None):
        x = self.activations(tokens)
        if replace is not None:
            x = torch.where(where.unsqueeze(-1), replace.to(x), x)
        return torch.tanh(x.float().mean(dim=2)) @ self.model["unembedding"].detach()


def spoil_last(value: float):
    """One entry of the last row becomes `value`."""

    def change(x):
        x = x.clone()
        x[-1, -1, 1, 0] = value
        return x

    return change


def alternate(x):
    return torch.ones_like(x) * (1 - 2 * (torch.arange(x.shape[-1]) % 2))


SAME = "left out: the held-out activations are the same in every row"
FREE = "loss_recovered left out: setting the activations to zero does not change the cross-entropy"
NOT_FINITE = r"activations of b are not finite in 1 of \d+ rows \(float32\): bad itself computes them, so check"
TOO_LARGE = r"activations of a reach \de\+\d\d in \d+ of \d+ rows \(float32\)"

# Name of the trial: what happens to activations, changes of the data, and what must be said.
COMPLETE = {
    "constant rows": (lambda x: torch.full_like(x, 0.1), {}, [SAME]),
    "rows of 0..d": (lambda x: 0 * x + torch.arange(x.shape[-1]), {}, [SAME]),
    "zeros": (torch.zeros_like, {}, [SAME, FREE]),
    "alternating signs": (alternate, {}, [SAME]),
    "one-hot": (lambda x: torch.nn.functional.one_hot(x.argmax(-1), x.shape[-1]).float(), {}, []),
    "denormals": (lambda x: x * 1e-41, {}, [FREE]),
    "1e-38": (lambda x: x * 1e-38, {}, [FREE]),
    "1e12": (lambda x: x * 1e12, {}, []),
    "offset": (lambda x: x + 1e5, {}, []),
    "equal sites": (lambda x: x[:, :, :1].expand_as(x), {}, []),
    "a site of zeros": (lambda x: torch.stack([x[:, :, 0], 0 * x[:, :, 1]], dim=2), {}, []),
    "two kinds of rows": (lambda x: torch.where(x[..., :1, :1] > 0, x[:1, :1], -x[:1, :1]), {}, []),
    "one held-out row": (lambda x: x, {"n_eval_tokens": 1, "exclude_first": 5}, [SAME]),
}
REFUSED = {
    "one NaN": (spoil_last(math.nan), NOT_FINITE),
    "one inf": (spoil_last(math.inf), NOT_FINITE),
    "one -inf": (spoil_last(-math.inf), NOT_FINITE),
    "1e38": (lambda x: x.clamp(-3, 3) * 1e38, TOO_LARGE),
    "1e17": (lambda x: x * 1e17, TOO_LARGE),
    "float16": (lambda x: (1e5 * x).half(), r"are not finite in \d+ of \d+ rows \(float16\): give lm.dtype=bfloat16\."),
}


def bad_data(change, d: int = 8, **changes) -> ActivationData:
    settings = SETTINGS | {"n_tokens": 24, "n_val_tokens": 6} | changes
    return from_documents(BadLM(change, d), partial(Numbers, n_documents=12), order="shuffled", **settings)


composed = cache(compose)


def small(name: str, data: ActivationData, *overrides: str):
    cfg = composed(f"sae={name}", "k=2", *overrides)
    return build_node(cfg, "sae", d_in=data.d_in, n_latents=16, n_sources=2)


@pytest.fixture
def no_figures(monkeypatch):
    for name in ("l0_per_token", "latent_density", "training_curves"):
        monkeypatch.setattr(plots, name, lambda *args, **options: Path("figure"))


def train_and_evaluate(sae, data: ActivationData, folder: Path) -> None:
    """The steps of a run without Lightning."""
    step = TrainingStep(sae.train(), torch.optim.Adam(sae.parameters(), lr=1e-3))
    for x in islice(data.new_stream(), data.n_steps):
        step(x)
    calibrate([sae], data, 3)
    save_sae(sae.eval(), folder / "sae", {}, data.probe_rows())
    write_results(evaluate(sae, data), sae, folder)


def assert_complete_and_finite(folder: Path, said: str, expected: list[str]) -> dict:
    """Every number is finite, and what is left out or wrong is told by the log and by the status of the job."""
    metrics = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert all(math.isfinite(value) for _, value in numbers(metrics))
    status, detail = read_status(folder)
    assert status == "complete"
    problems = find_problems(metrics)
    assert all(f"{folder}: {problem}." in said and problem in detail for problem in problems)
    assert [e for e in expected if not any(e in problem for problem in problems)] == []
    assert metrics.get("left_out", {}).keys().isdisjoint(metrics)
    assert {"nmse", "fvu"} <= metrics.keys() | metrics.get("left_out", {}).keys()
    return metrics


@pytest.mark.parametrize("kind", COMPLETE)
@pytest.mark.parametrize("name", SAE_NAMES)
def test_bad_numbers_end_in_finite_metrics(name, kind, tmp_path, caplog, no_figures):
    change, changes, expected = COMPLETE[kind]
    data = bad_data(change, **changes)
    train_and_evaluate(small(name, data), data, tmp_path)
    assert_complete_and_finite(tmp_path, caplog.text, expected)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", SAE_NAMES)
def test_bad_numbers_are_refused_where_they_arise(name, kind, tmp_path, no_figures):
    """Before a step is taken from them; and in held-out text, if the training text had none."""
    change, sentence = REFUSED[kind]
    data, sae = bad_data(lambda x: x), small(name, bad_data(lambda x: x))
    sae.train()(next(data.new_stream()))  # sets the scales that an evaluation needs
    with pytest.raises(UserError, match=sentence):
        train_and_evaluate(sae, bad_data(change), tmp_path)
    with pytest.raises(UserError, match=sentence):
        evaluate(sae.eval(), bad_data(change))
    assert list(tmp_path.iterdir()) == []


def config_of(name: str, folder: Path, *overrides: str):
    steps = ["n_tokens=24", "batch_size=4", "calibration_batches=2", "expansion=2", "k=2", "trainer.accelerator=cpu"]
    every = ["trainer.log_every=1", "trainer.validate_every=3", "trainer.checkpoint_every=100"]
    cfg = composed(f"sae={name}", *steps, *every, "run_dir=later", *overrides).copy()
    cfg.run_dir = str(folder)
    return cfg


@pytest.fixture
def train(monkeypatch, no_figures):
    """The real path of a run, on bad activations."""
    monkeypatch.setattr(provenance, "current_commit", lambda: None)

    def train_run(cfg, data: ActivationData) -> dict:
        monkeypatch.setattr(run, "build_data", lambda cfg: data)
        return run.train_run(cfg)

    return train_run


@pytest.mark.parametrize("kind", COMPLETE)
def test_a_run_on_bad_numbers_logs_and_reports_finite_ones(kind, train, tmp_path, caplog):
    change, changes, expected = COMPLETE[kind]
    train(config_of("batch_topk", tmp_path), bad_data(change, **changes))
    assert_complete_and_finite(tmp_path, caplog.text, expected)
    said = (tmp_path / "metrics.csv").read_text()
    assert "nan" not in said
    assert "inf" not in said
    if SAME in expected and not changes:
        assert "step 0: fvu, fvu_0, fvu_1 left out of the log: not finite, as where all rows of" in caplog.text


@pytest.mark.parametrize("kind", REFUSED)
def test_a_run_on_bad_numbers_is_not_complete(kind, train, tmp_path):
    change, sentence = REFUSED[kind]
    with pytest.raises(UserError, match=sentence) as error:
        train(config_of("topk", tmp_path), bad_data(change))
    assert "optimizer.lr" not in str(error.value)
    assert not (tmp_path / "metrics.json").exists()
    assert read_status(tmp_path)[0] == "interrupted"


@pytest.mark.parametrize("name", SAE_NAMES)
def test_activations_of_width_1(name, tmp_path, caplog, no_figures):
    data = bad_data(lambda x: x, d=1)
    for normalize in ("per_token", "constant_norm"):
        with pytest.raises(UserError, match=f"normalize={normalize} leaves nothing of activations of width 1"):
            small(name, data, f"sae.normalize={normalize}")
    train_and_evaluate(small(name, data, "sae.normalize=mean_norm"), data, tmp_path)
    metrics = assert_complete_and_finite(tmp_path, caplog.text, [])
    assert metrics["left_out"] == {"nmse": "activations of width 1 have no standard deviation"}


def test_held_out_text_that_is_left_out_whole():
    data = bad_data(lambda x: x)
    data.positions.mask = lambda tokens: torch.zeros_like(tokens, dtype=torch.bool)
    with pytest.raises(UserError, match=r"data.exclude_\* leaves out every held-out token"):
        evaluate(small("topk", data), data)


def test_less_held_out_text_than_asked_for_is_said(tmp_path, caplog, no_figures):
    caplog.set_level(logging.INFO, "sae_lab")
    data = bad_data(lambda x: x, n_eval_tokens=600_000)
    train_and_evaluate(small("topk", data), data, tmp_path)
    assert "evaluating on 60 held-out tokens, all there are (data.n_eval_tokens=600000)" in caplog.messages
    said = "evaluated on 60 held-out tokens, all there are, and not on 600,000"
    metrics = assert_complete_and_finite(tmp_path, caplog.text, [said])
    assert metrics["n_eval_tokens"] == metrics["n_held_out_tokens"] == 60


WARNED = {
    "dead": ({"l0": 0.0, "train_mode": {"l0": 0.0}}, "l0 is 0: no latent is active on any held-out token, and all 64"),
    "threshold": ({"l0": 0.0, "train_mode": {"l0": 4.0}}, "l0 is 0, but 4 under the training rule: the threshold is"),
    "all": ({"l0": 64.0}, "l0 equals n_latents=64: every latent is active on every held-out token"),
    "fine": ({"l0": 4.0, "train_mode": {"l0": 4.0}}, None),
}


@pytest.mark.parametrize(("metrics", "sentence"), WARNED.values(), ids=WARNED)
def test_signs_of_a_useless_sae_are_warned_about(metrics, sentence, tmp_path, caplog):
    write_metrics(metrics, build("topk"), tmp_path / "metrics.json")
    assert caplog.text.count("WARNING") == bool(sentence)
    assert (f"{tmp_path}: {sentence}" if sentence else "") in caplog.text
    assert read_status(tmp_path) == ("complete", "; ".join(find_problems({"n_latents": 64} | metrics)))


def test_a_threshold_above_every_preactivation(tmp_path, caplog, no_figures):
    data = bad_data(lambda x: x)
    sae = small("batch_topk", data)
    sae.threshold.fill_(math.inf)
    write_results(evaluate(sae, data), sae, tmp_path)
    assert f"{tmp_path}: l0 is 0, but 2 under the training rule: the threshold is above every" in caplog.text
    with pytest.raises(UserError, match="threshold of the BatchTopKSAE not finite, so it is not saved"):
        save_sae(sae, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_never_written(value, tmp_path):
    sae = build("topk")
    metrics = {"fvu": 0.5, "train_mode": {"kl": value}}
    with pytest.raises(UserError, match=rf"^train_mode/kl is {value}, although the activations are finite"):
        write_results(Evaluation(metrics, {}, 1.0), sae, tmp_path)
    with pytest.raises(UserError, match=r"^train_mode/kl is"):
        write_metrics(metrics, sae, tmp_path / "metrics.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "any.json", metrics)
    assert list(tmp_path.iterdir()) == []


def test_metrics_of_earlier_versions_that_are_not_finite_are_no_result(tmp_path, train, caplog):
    good, bad = tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        train(config_of("topk", folder), bad_data(lambda x: x))
    metrics = json.loads((bad / "metrics.json").read_text()) | {"fvu": math.nan}
    (bad / "metrics.json").write_text(json.dumps(metrics))
    (bad / "digests.json").unlink()  # which earlier versions did not write
    assert read_status(bad)[0] == "unreadable"
    assert "holds numbers that are not finite (fvu is nan): evaluate that run again" in read_status(bad)[1]
    table = collect_table(tmp_path)
    assert complete_jobs(table)["job"].tolist() == ["good"]
    assert table["fvu"].isna().tolist() == [True, False]
    with pytest.raises(UserError, match="fvu is nan"):
        train(config_of("topk", bad), bad_data(lambda x: x))


def test_a_loss_that_is_not_finite_is_blamed_on_its_cause(train, tmp_path):
    with pytest.raises(UserError, match=r"training has diverged by step \d.*lower optimizer.lr"):
        train(config_of("topk", tmp_path, "optimizer.lr=1e30", "sae.normalize=none"), bad_data(lambda x: x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_check_sees_every_entry(dtype):
    x = planted(10, n_sources=3)[0].to(dtype)
    assert check_finite(x, "abc", "") is x
    assert len(check_finite(x[:0], "abc", "")) == 0
    for i in range(0, x.numel(), 7):
        for value in (math.nan, math.inf, -math.inf):
            y = x.clone()
            y.view(-1)[i] = value
            name = str(dtype).removeprefix("torch.")
            sentence = rf"^activations of {'abc'[i // 16 % 3]} are not finite in 1 of 10 rows \({name}\): do this$"
            with pytest.raises(UserError, match=sentence):
                check_finite(y, "abc", "do this")


def test_a_member_that_cannot_be_saved_fails_alone(tmp_path, monkeypatch, no_figures):
    """Its group goes on; what is said of each member stands in its own log."""
    monkeypatch.setattr(shared_stream, "build_data", lambda cfg: bad_data(torch.zeros_like))
    monkeypatch.setattr(provenance, "current_commit", lambda: None)
    monkeypatch.setattr(BatchTopKSAE, "calibrate", lambda sae, x, i: sae.threshold.fill_(math.inf))
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.FileHandler(tmp_path / "train.log")])
    configs = [config_of(name, tmp_path / name) for name in ("batch_topk", "topk")]
    shared_stream.train_jobs([shared_stream.Job(cfg, {}, run.hydra_files(cfg)) for cfg in configs])
    assert read_status(tmp_path / "batch_topk")[0] == "failed"
    assert "threshold of the BatchTopKSAE not finite" in read_status(tmp_path / "batch_topk")[1]
    assert read_status(tmp_path / "topk")[0] == "complete"
    said = {name: (tmp_path / name / "train.log").read_text() for name in ("batch_topk", "topk")}
    assert "l0 is 0: no latent is active" in said["topk"]
    assert "l0 is 0" not in said["batch_topk"]
    assert "batch_topk failed: threshold of the" in said["batch_topk"]


def test_a_cache_of_bad_numbers_is_not_used(tmp_path, monkeypatch):
    """Checksums are right, but the rows are not what `harvest` would have written."""
    monkeypatch.setattr("sae_lab.cache.files.check_finite", lambda rows, *_: rows)
    monkeypatch.setattr("sae_lab.activations.workers.FiniteCheck.wait", lambda check: check.rows)
    CacheWriter(bad_data(spoil_last(math.nan)), str(tmp_path), 24, 100, "float16").build()
    monkeypatch.undo()
    source = CachedSource(Cache(str(tmp_path)), 100, 0, False, torch.device("cpu"))
    with pytest.raises(UserError, match=r"of b are not finite in 2 of 24 rows \(float16\): that cache was not"):
        next(iter(source))


def test_every_trial_is_counted():
    assert len(SAE_NAMES) * (len(COMPLETE) + len(REFUSED) + 1) + len(COMPLETE) + len(REFUSED) >= 110


@pytest.fixture(autouse=True)
def all_warnings(caplog):
    caplog.set_level(logging.WARNING)


def test_a_run_of_few_steps_says_so_where_most_latents_are_dead():
    assert find_too_few_steps({"dead_fraction": 0.84}, 20) == (
        "after only 20 steps 84% of the latents are active on no held-out token: "
        "give more n_tokens or a smaller batch_size"
    )
    assert find_too_few_steps({"dead_fraction": 0.84}, 10_000) is None
    assert find_too_few_steps({"dead_fraction": 0.1}, 20) is None
