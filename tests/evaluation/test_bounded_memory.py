"""The memory of an evaluation depends on no vocabulary, and its numbers on no size of a slice or of a pass."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import compose

from sae_lab.activations.passes import batch_sizes, plan_passes
from sae_lab.evaluation.evaluator import evaluate
from sae_lab.lm import predictions
from sae_lab.lm.finding import TINY, find_folder
from sae_lab.runs.loading import load_run
from sae_lab.training.run import build_data, build_sae

VOCABULARY = 256_000


def numbers(metrics: dict) -> dict:
    return {name: pytest.approx(value, abs=1e-5) for name, value in metrics.items() if isinstance(value, int | float)}


@pytest.fixture(scope="module")
def small():
    """An SAE with a batch-wise rule, and data on the bundled model with rows in which positions are left out."""
    sizes = ["seq_len=32", "batch_size=128", "data.n_eval_tokens=1024", "data.block_tokens=1024", "n_tokens=1024"]
    cfg = compose(*sizes, "expansion=2", "data.exclude_first=3", "lm.device=cpu")
    data = build_data(cfg)
    sae = build_sae(cfg, data)
    for x in data.calibration_batches(4):
        sae.calibrate(x, 0)
    return sae.eval(), data


@pytest.mark.parametrize("positions", [7, 32, 100])
def test_slices_change_no_number(small, monkeypatch, positions):
    whole = evaluate(*small).metrics
    monkeypatch.setattr(predictions, "SLICE_BYTES", 4 * 4096 * positions)
    sliced = evaluate(*small).metrics
    assert sliced == numbers(whole) | {name: sliced[name] for name in ("train_mode",)}
    assert sliced["train_mode"] == numbers(whole["train_mode"])


@pytest.mark.parametrize("rows", [1, 6, 1000])
def test_the_rows_of_a_pass_change_no_number(small, monkeypatch, rows):
    whole = evaluate(*small).metrics
    monkeypatch.setattr(small[1], "lm_batch_rows", rows)
    other = evaluate(*small).metrics
    assert other["train_mode"] == numbers(whole["train_mode"])
    assert other["ce_spliced"] == pytest.approx(whole["ce_spliced"], abs=1e-5)


def test_batches_are_whole_rows_of_about_the_training_size(small, monkeypatch):
    data = small[1]
    rows = torch.arange(22 * 32).view(22, 32) + 1
    for pass_rows, expected in ((1, [4, 4, 4, 4, 3, 3]), (8, [8, 8, 6]), (99, [22])):
        monkeypatch.setattr(data, "lm_batch_rows", pass_rows)
        passes = list(plan_passes(rows, data.batch_size, pass_rows))
        assert [len(tokens) for tokens, _ in passes] == expected
        assert torch.equal(torch.cat([tokens for tokens, _ in passes]), rows)
        assert [n for _, batches in passes for n in batches] == [4, 4, 4, 4, 3, 3]
    keep = rows % 32 > 2
    assert batch_sizes(keep, [4, 4, 4, 4, 3, 3]) == [116, 116, 116, 116, 87, 87]


def save_gemma(folder) -> None:
    """A small model with the vocabulary of Gemma 2, its softcapping, and the bundled tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = Gemma2Config(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, **heads, **tokens)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(find_folder(TINY)).save_pretrained(folder)


@pytest.mark.process
def test_a_vocabulary_of_256_000_fits_into_3_gb(tmp_path, monkeypatch):
    """One copy of the logits of these 1,024 tokens would take 1 GB."""
    model, folder = tmp_path / "gemma", tmp_path / "run"
    save_gemma(model)
    lm = ["lm=transformers", f"lm.name={model}", "lm.sites=[model.layers.0]", "lm.device=cpu", "trainer=cpu"]
    sizes = ["n_tokens=2048", "data.n_eval_tokens=1024", "data.n_val_tokens=1024", "calibration_batches=1"]
    command = [sys.executable, "-m", "sae_lab.train", *lm, *sizes, "sae=topk", f"hydra.run.dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_maxrss < 3_000_000  # kB

    monkeypatch.setattr(predictions, "SLICE_BYTES", 4 * VOCABULARY * 16)
    sae, data, _ = load_run(folder, "cpu", 256)
    small_slices = evaluate(sae, data).metrics
    monkeypatch.undo()
    here = evaluate(sae, data).metrics
    assert here["kl"] > 0.1
    for name in ("ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl"):
        assert here[name] == pytest.approx(small_slices[name], abs=1e-5), name
