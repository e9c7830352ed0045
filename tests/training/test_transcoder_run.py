"""A transcoder from the command line: trained on an MLP, spliced into the model in its place, looked at."""

import json
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from shell import run
from small_runs import assert_continues_to_the_bits_of
from transformers import AutoModelForCausalLM

from sae_lab.runs.loading import load_run

pytestmark = pytest.mark.process

SMALL = [
    *("experiment=transcoder", "sae=topk", "sae.skip=true", "n_tokens=30_000", "expansion=4", "seq_len=64"),
    *("data.block_tokens=10_000", "data.n_eval_tokens=2_048", "data.n_val_tokens=1_024", "trainer.validate_every=20"),
    *("trainer.checkpoint_every=5", "calibration_batches=5"),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "transcoder"
    done = run(*SMALL, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def test_metrics_agree_with_plain_pytorch(run_dir, tiny_lm_folder):
    """The MLP's output is replaced by what the transcoder makes of its input, and nothing else is."""
    sae, data, _ = load_run(run_dir, "cpu")
    tokens = data.held_out_rows(2_048)
    lm = AutoModelForCausalLM.from_pretrained(tiny_lm_folder, dtype=torch.float32).eval()
    seen = []

    def cross_entropy(edit) -> float:
        handle = lm.transformer.h[3].mlp.register_forward_hook(lambda m, i, out: edit(i[0], out))
        try:
            logits = lm(tokens).logits[:, :-1]
        finally:
            handle.remove()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

    with torch.no_grad():
        mine = {"ce_clean": cross_entropy(lambda x, y: seen.append((x, y)))}
        x, y = (t.flatten(0, 1) for t in seen[0])
        z = (x / sae.sources.normalizer.scale @ sae.W_enc[:, 0].T + sae.b_enc).relu()
        z = z * (z >= z.topk(16).values[:, -1:])
        y_hat = z @ sae.W_dec[:, 0] + sae.b_dec[0] + x / sae.sources.normalizer.scale @ sae.W_skip.T
        y_hat *= sae.sources.target_normalizer.scale
        mine |= {
            "fvu": ((y - y_hat).square().sum() / (y - y.mean(0)).square().sum()).item(),
            "l0": (z > 0).sum(-1).float().mean().item(),
            "ce_spliced": cross_entropy(lambda x, y: y_hat.view_as(y)),
            "ce_zero": cross_entropy(lambda x, y: torch.zeros_like(y)),
            "ce_mean": cross_entropy(lambda x, _: y.mean(0).expand_as(x)),
        }
    metrics = json.loads((run_dir / "metrics.json").read_text())
    for name, value in mine.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert metrics["ce_zero"] > metrics["ce_mean"] > metrics["ce_clean"]
    assert {name for name in metrics if name.startswith(("fvu_", "share_"))} == set()


def test_a_stopped_run_continues_to_the_same_bits(run_dir, tmp_path):
    assert_continues_to_the_bits_of(run_dir, tmp_path, SMALL, signal.SIGTERM, 30)


def test_its_features_promote_tokens(run_dir):
    done = run(f"run_dir={run_dir}", "n_latents=4", "n_tokens=2_000", module="features")
    assert done.returncode == 0, done.stderr
    page = json.loads((run_dir / "features_n_latents=4,n_tokens=2000" / "features.json").read_text())
    assert page["sites"] == ["blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"]
    assert all(latent["promoted"] for latent in page["latents"])


def test_what_does_not_fit_is_one_sentence(run_dir, tmp_path):
    searched = run(f"run_dir={run_dir}", "encoder=gradient_pursuit", module="evaluate")
    assert searched.returncode == 1
    assert "n_inputs" in searched.stderr
    assert "Traceback" not in searched.stderr
    lonely = run(*SMALL, "lm.sites=[blocks.3.hook_mlp_out]", f"hydra.run.dir={tmp_path}")
    assert lonely.returncode == 1
    assert "leaves none to predict: give lm.sites=" in lonely.stderr
