"""The main job, run as a user runs it: train, stop, continue, evaluate, and every mistake's one sentence."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import SAE_NAMES
from shell import Forked, run
from small_runs import N_EVAL, N_STEPS, SMALL, assert_continues_to_the_bits_of, assert_one_sentence
from transformers import AutoModelForCausalLM, AutoTokenizer

import sae_lab
from sae_lab import load_sae
from sae_lab.text.bundled import StdlibDocuments
from sae_lab.text.documents import HELD_OUT
from sae_lab.text.permutation import permute

pytestmark = pytest.mark.process

SHORT = ["n_tokens=4_096", "data.n_eval_tokens=512", "data.n_val_tokens=512", "calibration_batches=2"]
FROZEN_INSIDE = ["sae=route", "lm.sites=[transformer.h.1,transformer.h.3]", "sae.inner.frozen_decoder=true"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """One uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    done = run(*SMALL, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_from_the_shell_says_two_lines_before_its_results(tmp_path):
    """Lightning's import sets its loggers to INFO: the hardware, tips and a stop would be told, twice each."""
    done = run("experiment=quick_test", *SHORT, f"hydra.run.dir={tmp_path}", shell=True)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"training 4 steps of 1024 tokens at learning rate 0.01 in {tmp_path}",
        "evaluating on 512 held-out tokens (data.n_eval_tokens)",
    ]
    assert "lightning" not in (tmp_path / "train.log").read_text()


def test_a_run_leaves_every_file(run_dir):
    files = ["metrics.json", "metrics.csv", "checkpoints/last.ckpt"]
    files += [f"sae/{name}" for name in ("config.json", "sae.safetensors", "probe.safetensors")]
    files += [".hydra/config.yaml", ".hydra/overrides.yaml", ".hydra/hydra.yaml", "train.log"]
    files += [f"figures/{name}.png" for name in ("l0_per_token", "latent_density", "training")]
    assert [f for f in files if not (run_dir / f).is_file()] == []
    log = pd.read_csv(run_dir / "metrics.csv")
    assert log["tokens"].dropna().tolist() == [1024.0, *(1024.0 * i for i in range(10, N_STEPS, 10)), 30_000.0]
    assert {"loss", "loss/reconstruction", "loss/auxk", "fvu", "l0", "dead_share", "val/fvu", "val/l0"} <= set(log)
    assert log["fvu"].dropna().iloc[-1] < log["fvu"].dropna().iloc[0]


def held_out_tokens(tokenizer) -> torch.Tensor:
    """The rows of the evaluation, from the text, a BOS first in each."""
    documents, stream = StdlibDocuments(HELD_OUT), []
    for i in range(len(documents)):
        stream.append(0)
        for piece in re.findall(r"(?s).{1,65536}", documents[i]):
            stream += tokenizer(piece)["input_ids"]
    rows, at = [], 0
    while at + 64 <= len(stream):
        at += stream[at] == 0  # a document boundary at the start of a row is the row's own BOS
        rows.append([0, *stream[at : at + 63]])
        at += 63
    return torch.tensor(rows)[permute(np.arange(N_EVAL // 64), len(rows), 0, 0)]


def test_metrics_agree_with_plain_pytorch(run_dir, tiny_lm_folder):
    """Every metric again, from the SAE folder, the LM and the text, in plain PyTorch."""
    tokens = held_out_tokens(AutoTokenizer.from_pretrained(tiny_lm_folder))
    lm = AutoModelForCausalLM.from_pretrained(tiny_lm_folder, dtype=torch.float32).eval()
    sae = load_sae(run_dir / "sae")

    def log_probs(edit) -> torch.Tensor:
        handle = lm.transformer.h[2].register_forward_hook(lambda m, i, out: edit(out))
        try:
            return lm(tokens).logits[:, :-1].log_softmax(-1).flatten(0, 1)
        finally:
            handle.remove()

    def cross_entropy(edit) -> float:
        return F.nll_loss(log_probs(edit), tokens[:, 1:].flatten()).item()

    with torch.no_grad():
        x = lm(tokens, output_hidden_states=True).hidden_states[3].flatten(0, 1)
        h = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)
        z = torch.relu((h - sae.b_dec[0]) @ sae.W_enc[:, 0].T)
        z = torch.where(z > sae.threshold, z, 0.0)
        x_hat = (z @ sae.W_dec[:, 0] + sae.b_dec[0]) * x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
        clean = log_probs(lambda out: out)
        mine = {
            "fvu": ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item(),
            "nmse": ((x - x_hat) / (x.std(-1, keepdim=True) + 1e-5)).square().mean().item(),
            "l0": (z > 0).sum(-1).float().mean().item(),
            "l0_std": (z > 0).sum(-1).float().std(correction=0).item(),
            "cosine_similarity": F.cosine_similarity(x, x_hat).mean().item(),
            "dead_fraction": (z.max(0).values == 0).float().mean().item(),
            "ce_clean": cross_entropy(lambda out: out),
            "ce_spliced": cross_entropy(lambda out: x_hat.view_as(out)),
            "ce_zero": cross_entropy(torch.zeros_like),
            "kl": (clean.exp() * (clean - log_probs(lambda out: x_hat.view_as(out)))).sum(-1).mean().item(),
            "ce_mean": cross_entropy(lambda out: x.mean(0).expand_as(out)),
        }
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["n_eval_tokens"] == len(x)
    for name, value in mine.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    assert metrics["ce_degradation"] == pytest.approx(mine["ce_spliced"] - mine["ce_clean"], abs=1e-3)
    recovered = (mine["ce_zero"] - mine["ce_spliced"]) / (mine["ce_zero"] - mine["ce_clean"])
    assert metrics["loss_recovered"] == pytest.approx(recovered, abs=1e-3)


def test_train_mode_metrics_are_those_of_the_batch_rule(run_dir):
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["train_mode"]["l0"] == pytest.approx(16, abs=1e-6)
    assert metrics["l0"] != metrics["train_mode"]["l0"]
    assert metrics["ce_clean"] == metrics["train_mode"]["ce_clean"]


def test_text_that_ends_ends_the_run(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 3000)
    text = ["data=text_files", f"data.paths={tmp_path}/text.txt", "data.repeat=false", f"hydra.run.dir={tmp_path}/run"]
    for _ in range(2):
        done = run(*SMALL, *text, "data.exclude_bos=true", "lm.sites=[transformer.h.1,transformer.h.3]", "sae=topk")
        assert done.returncode == 0, done.stderr
    assert "complete" in done.stderr
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 0 < state["global_step"] < N_STEPS
    sae = load_sae(tmp_path / "run")
    assert (sae.n_sources, sae.d_in, sae.n_latents) == (2, 128, 512)


def test_a_sweep_makes_a_folder_a_job_and_a_report(tmp_path):
    done = run("-m", *SMALL, "sae=topk,batch_topk", "k=4,8", *SHORT, f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    jobs = sorted(p.parent.name for p in tmp_path.glob("*/metrics.json"))
    assert len(jobs) == 4
    assert all(
        f"k={k}" in " ".join(jobs) and f"sae={sae}" in " ".join(jobs) for k in (4, 8) for sae in ("topk", "batch_topk")
    )
    assert run(f"sweep_dir={tmp_path}", module="report").returncode == 0
    report = pd.read_csv(tmp_path / "report.csv")
    assert sorted(zip(report["sae"], report["k"], strict=True)) == [
        (s, k) for s in ("batch_topk", "topk") for k in (4, 8)
    ]
    assert (tmp_path / "figures" / "nmse_ce_vs_k_n512.png").is_file()


def test_a_signal_ends_a_sweep_and_not_one_job_of_it(tmp_path):
    sweep = Forked("-m", *SMALL, "k=4,8", f"hydra.sweep.dir={tmp_path}")
    while not list(tmp_path.glob("*/checkpoints/last.ckpt")):
        assert sweep.running, sweep.communicate().stderr
        time.sleep(0.01)
    sweep.send_signal(signal.SIGTERM)
    stopped = sweep.communicate()
    assert stopped.returncode == 128 + signal.SIGTERM
    assert stopped.stderr.endswith(": the same command continues.\n")  # as it names the sweep's folder
    assert len(list(tmp_path.glob("*/train.log"))) == 1


def test_a_stopped_run_in_a_folder_named_by_the_time_says_which_it_is(tmp_path):
    """The same command alone would begin another one."""
    forked = Forked(*SMALL, cwd=tmp_path)
    while not (saved := list(tmp_path.glob("outputs/*/*/checkpoints/last.ckpt"))):
        assert forked.running, forked.communicate().stderr
        time.sleep(0.01)
    forked.send_signal(signal.SIGINT)
    folder = saved[0].parents[1].relative_to(tmp_path)
    assert forked.communicate().stderr.endswith(f": the same command with hydra.run.dir={folder} continues.\n")


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stopped_run_continues_to_the_same_bits(run_dir, tmp_path, stop):
    assert_continues_to_the_bits_of(run_dir, tmp_path / "stopped", SMALL, stop, N_STEPS)


def test_so_it_does_on_two_threads(tmp_path):
    """Short: where the cores are taken, two threads wait for each other at every operation."""
    short = [*SMALL, *SHORT, "n_tokens=10_240", "trainer.checkpoint_every=3", "data.block_tokens=2_048"]
    short += ["callbacks=keep_saes", "callbacks.keep_saes.every=4"]
    done = run(*short, f"hydra.run.dir={tmp_path / 'whole'}", threads=2)
    assert done.returncode == 0, done.stderr
    assert_continues_to_the_bits_of(tmp_path / "whole", tmp_path / "stopped", short, signal.SIGINT, 10, threads=2)


def test_a_complete_run_says_so_and_changes_nothing(run_dir):
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*") if p.is_file() and p.name != "train.log"}
    again = run(*SMALL, f"hydra.run.dir={run_dir}")
    assert again.returncode == 0
    assert "is complete" in again.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_folder_of_another_config_is_refused_and_kept(run_dir):
    before = (run_dir / ".hydra" / "config.yaml").read_bytes()
    refused = run(*SMALL, "k=8", "optimizer.lr=3e-4", f"hydra.run.dir={run_dir}")
    assert_one_sentence(refused, "k is 16 there and 8 here")
    assert "optimizer.lr is auto there and 0.0003 here" in refused.stderr
    assert (run_dir / ".hydra" / "config.yaml").read_bytes() == before


def test_an_unreadable_checkpoint_is_named(run_dir, tmp_path):
    folder = tmp_path / "broken"
    (folder / "checkpoints").mkdir(parents=True)
    whole = (run_dir / "checkpoints" / "last.ckpt").read_bytes()
    (folder / "checkpoints" / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    assert_one_sentence(run(*SMALL, f"hydra.run.dir={folder}"), "cannot be read", "resume=never")


def test_evaluate_repeats_the_metrics(run_dir):
    before = json.loads((run_dir / "metrics.json").read_text())
    (run_dir / "figures" / "l0_per_token.png").unlink()
    done = run(f"run_dir={run_dir}", module="evaluate")
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "metrics.json").read_text()) == before
    assert (run_dir / "figures" / "l0_per_token.png").is_file()


def test_a_run_starts_from_the_weights_of_another(run_dir, tmp_path):
    short = [*SMALL, "data.n_eval_tokens=1024", "calibration_batches=2", "optimizer.lr=1e-3"]
    done = run(*short, "experiment=mlp_encoder", "n_tokens=5_000", f"init_from={run_dir}", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    given, learnt = load_sae(run_dir), load_sae(tmp_path)
    assert torch.equal(learnt.W_dec, given.W_dec)
    assert learnt.mlp.W_out.any()
    assert (learnt.W_enc - given.W_enc).norm() < 0.2 * given.W_enc.norm()


def evaluate_beside(run_dir: Path, *overrides: str) -> dict[str, Any]:
    """Evaluate under another rule, k or encoder, which leaves metrics.json alone. Returns the metrics in that."""
    before = (run_dir / "metrics.json").read_bytes()
    done = run(f"run_dir={run_dir}", *overrides, module="evaluate")
    assert done.returncode == 0, done.stderr
    assert (run_dir / "metrics.json").read_bytes() == before
    own: dict[str, Any] = json.loads(before)
    return own


def test_evaluate_under_another_activation_writes_a_file_of_its_own(run_dir):
    for activation in ("topk", "threshold"):
        own = evaluate_beside(run_dir, f"activation={activation}")
    del own["train_mode"]
    topk, thresholded = (json.loads((run_dir / f"metrics_{name}.json").read_text()) for name in ("topk", "threshold"))
    assert (topk["l0"], topk["l0_std"]) == (16, 0)
    assert topk["fvu"] != own["fvu"] == pytest.approx(topk["fvu"], rel=0.2)
    assert thresholded == own | {"activation": "threshold"}


def test_evaluate_takes_another_k_and_calibrates_for_it(run_dir):
    own = evaluate_beside(run_dir, "k=6", "overwrite=true")
    metrics = json.loads((run_dir / "metrics_k=6.json").read_text())
    assert metrics["settings"] == {"k": 6}
    assert metrics["l0"] == pytest.approx(6, rel=0.2)
    assert metrics["fvu"] > own["fvu"]


def test_evaluate_compares_a_pursuit_with_the_saes_own_encoder(run_dir):
    own = evaluate_beside(run_dir, "encoder=gradient_pursuit", "pursuit.k=12")
    metrics = json.loads((run_dir / "metrics_gradient_pursuit_k12.json").read_text())
    assert metrics["own"]["fvu"] == pytest.approx(own["fvu"])
    assert metrics["gradient_pursuit"]["fvu"] < metrics["own"]["fvu"]
    assert metrics["gradient_pursuit"]["l0"] <= 12
    both = run(f"run_dir={run_dir}", "encoder=matching_pursuit", "activation=topk", module="evaluate")
    assert_one_sentence(both, "activation=topk and encoder=matching_pursuit replace the same thing")
    refused = run(f"run_dir={run_dir}", "encoder=newton", module="evaluate")
    assert_one_sentence(refused, "encoder=newton is not known: choose own or one of matching_pursuit")


def test_evaluate_takes_a_kept_sae_and_writes_into_its_folder(tmp_path):
    short = [*SMALL, "sae=topk", "n_tokens=8_192", "data.n_eval_tokens=1024", "callbacks=keep_saes"]
    assert run(*short, "callbacks.keep_saes.every=4", f"hydra.run.dir={tmp_path}").returncode == 0
    own = {file: file.read_bytes() for file in (tmp_path / "metrics.json", *(tmp_path / "figures").iterdir())}
    first, last = (tmp_path / "steps" / step for step in ("4", "8"))
    for folder, *over in ((first,), (last,), (first, "activation=batch_topk"), (first, "encoder=matching_pursuit")):
        done = run(f"run_dir={tmp_path}", f"sae_dir={folder}", *over, module="evaluate")
        assert done.returncode == 0, done.stderr
    assert {file: file.read_bytes() for file in own} == own
    assert list(tmp_path.glob("metrics*.json")) == [tmp_path / "metrics.json"]
    assert (last / "metrics.json").read_bytes() == own[tmp_path / "metrics.json"]  # TopK needs no calibration
    early, whole = (json.loads((folder / "metrics.json").read_text()) for folder in (first, last))
    assert early["fvu"] > 1.05 * whole["fvu"]
    assert json.loads((first / "metrics_batch_topk.json").read_text())["l0"] == pytest.approx(16)
    assert json.loads((first / "metrics_matching_pursuit.json").read_text())["own"]["fvu"] == early["fvu"]
    refused = run(f"run_dir={tmp_path}", f"sae_dir={tmp_path}/steps", module="evaluate")
    assert_one_sentence(refused, "steps holds no config.json: give an SAE folder")


def test_a_run_is_exported_with_all_that_sae_lens_asks(run_dir, tmp_path):
    done = run(f"run_dir={run_dir}", f"out={tmp_path}", module="export")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "cfg.json").read_text())
    metadata = {name: config["metadata"][name] for name in ("model_name", "hook_name", "context_size", "prepend_bos")}
    expected = {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post", "context_size": 64, "prepend_bos": True}
    assert metadata == expected
    assert config["metadata"]["dataset_path"] == "sae_lab.activations.from_text.stdlib"
    x = torch.randn(20, 128)
    torch.testing.assert_close(load_sae(tmp_path).encode(x), load_sae(run_dir).encode(x), rtol=1e-5, atol=1e-5)
    card = (tmp_path / "README.md").read_text()
    assert "# BatchTopKSAE of tiny at transformer.h.2" in card
    assert "![training](figures/training.png)" in card


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sae.kk=3"], ["sae has no key kk", "did you mean k?"]),
        (["batch_sise=3"], ["did you mean batch_size?"]),
        (["sae=topkk"], ["sae=topkk is not known: did you mean topk?", ", ".join(SAE_NAMES)]),
        (["experiment=nope"], ["experiment=nope is not known", "quick_test"]),
        (["k=2000"], ["k=2000 must lie between 1 and the dictionary's 1024 latents", "give more latents"]),
        (["lm.sites=[transformer.h.9]"], ["tiny has no site 'transformer.h.9'", "transformer.h.5"]),
        (["lm=gpt2"], ["gpt2 is neither a local folder nor in the Hugging Face cache", "lm=tiny"]),
        (["data=text_files", "data.paths=[/nowhere/*.txt]"], ["no file matches", "data.paths="]),
        (["data=text_files"], ["data.paths has no value: give data.paths=..."]),
        (["n_tokens=10"], ["less than one batch", "raise n_tokens"]),
        (["batch_size=0"], ["batch_size=0 must be a whole number of at least 1"]),
        (
            ["trainer.precision=bf16-true"],
            ["trainer.precision=bf16-true is not known: choose 32-true", "bf16-mixed"],
        ),
        (["+sae.gamma=3"], ["sae.gamma is not a setting of DictionarySAE"]),
        (["k=abc"], ["k=abc must be a number"]),
        (["k=[1,2]"], ["k=[1,2] must be a number"]),
        (["expansion=nan"], ["expansion=nan must be null or a number of at least 0"]),
        (["seq_len=64.5"], ["seq_len=64.5 must be a whole number of at least 2"]),
        (["optimizer.lr=fast"], ["optimizer.lr=fast must be a number"]),
        *(
            ([f"optimizer.lr={lr}"], [f"optimizer.lr={lr} must be a number above 0, or auto."])
            for lr in ("0", "-0.001", "nan")
        ),
        (["n_tokens=null"], ["n_tokens=null must be a whole number of at least 1"]),
        (["trainer.devices=null"], ["trainer.devices=null must be a whole number of at least 1"]),
        (["expansion=null"], ["n_latents=null with expansion=null does not define the size of the dictionary"]),
        (["max_grad_norm=-1"], ["max_grad_norm=-1 must be null or a number above 0"]),
        (["max_grad_norm=0"], ["max_grad_norm=0 must be null or a number above 0"]),
        (["experiment=mlp_encoder"], ["would freeze a random dictionary", "give init_from="]),
        (["experiment=kl_finetune"], ["goes on from a trained SAE", "give init_from="]),
        (["experiment=pursuit_dictionary"], ["goes on from a trained SAE", "give init_from="]),
        (["init_from=nowhere"], ["nowhere is not a folder, a file or one of the", "sae_lab.releases` lists them"]),
        (["resume=maybe"], ["resume=maybe is not known", "never"]),
        (["optimizer.betas=0.9"], ["optimizer.betas=0.9 must be two numbers from 0 to below 1, such as [0.9,0.99]"]),
        (["optimizer.betas=[0.9,1]"], ["optimizer.betas=[0.9,1] must be two numbers"]),
        (["optimizer.eps=abc"], ["optimizer.eps=abc must be a number of at least 0"]),
        (
            ["optimizer.weight_decay=1e-4"],
            ["optimizer has no key weight_decay", "+optimizer.weight_decay=1e-4 adds it"],
        ),
        (["+optimizer.weight_decay=abc"], ["optimizer.weight_decay=abc must be a number of at least 0"]),
        (
            ["schedule.warmup=1000"],
            ["schedule.warmup=1000 must be a share of the run's steps", "type schedule.warmup=0.5"],
        ),
        (["+callbacks.mine._target_=nope.Nope"], ["callbacks.mine._target_=nope.Nope cannot be imported"]),
        (
            ["callbacks=null"],
            ["callbacks=null names no choice of callbacks: type", "one of keep_best, keep_saes, none, splice_ce"],
        ),
        (["data=text_files", "data.paths=5"], ["data.paths=5 must be a list of globs"]),
        (["trainer.accelerator=tpu"], ["trainer.accelerator=tpu is not known: choose auto"]),
        (["lm.sites=null"], ["lm.sites=null must name at least one site"]),
        (["lm=transformers", "lm.name=./nowhere"], ["lm.name=./nowhere is not a folder"]),
        (["lm=transformer_lens", "lm.name=./nowhere"], ["lm.name=./nowhere is not a folder"]),
        (["lm=transformers", "lm.name=tiny"], ["lm.sites=null must name", "choose among transformer.h.0 ... "]),
        (["lm.name=null"], ["lm.name=null must be a hub name or the path of a folder"]),
        (["sae.k_aux=0"], ["sae.k_aux=0 must be null or a whole number of at least 1"]),
        (["sae.frozen_decoder=maybe"], ["sae.frozen_decoder=maybe must be true or false"]),
        (FROZEN_INSIDE, ["would freeze a random dictionary", "give init_from="]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_mistake_gets_one_sentence(overrides, sentence, tmp_path):
    assert_one_sentence(run(*overrides, f"hydra.run.dir={tmp_path}"), *sentence)


def test_another_text_or_model_does_not_overwrite_an_evaluation(run_dir, tmp_path):
    folder = shutil.copytree(run_dir, tmp_path / "run")
    file = folder / "checkpoints" / "last.ckpt"
    state = torch.load(file, weights_only=True)
    state["ActivationData"]["origin"]["the language model's weights"] = "others"
    torch.save(state, file)
    before = (folder / "metrics.json").stat().st_mtime_ns
    refused = run(f"run_dir={folder}", module="evaluate")
    assert_one_sentence(refused, "the language model's weights changed since this run began")
    assert (folder / "metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("launcher", ["basic", "shared_stream"])
def test_each_job_of_a_sweep_is_a_wandb_run_of_its_own(launcher, tmp_path):
    """All jobs are in one process. A run holds the config, the training figures and the evaluation."""
    short = [*SMALL, "n_tokens=4_096", "data.n_eval_tokens=512", "trainer.log_every=1"]
    wandb = ["logger=wandb", "logger.wandb.offline=true", "logger.wandb.histograms=true", "logger.wandb.artifacts=true"]
    done = run("-m", *short, *wandb, "k=4,8", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    jobs = sorted(file.parent for file in tmp_path.glob("*/metrics.json"))
    assert len(jobs) == 2
    for job in jobs:
        [content] = [file.read_bytes() for file in job.glob("wandb/offline-run-*/run-*.wandb")]
        for said in (
            b"dead_after",
            b"loss/reconstruction",
            b"eval/loss_recovered",
            b"eval/log2_activation",
            b"sae.safetensors",
        ):
            assert said in content
    assert len({(job / "wandb" / "run_id").read_text() for job in jobs}) == 2


def test_wandb_without_a_key_names_both_ways_out(tmp_path):
    without = dict.fromkeys(("HOME", "NETRC", "WANDB_CONFIG_DIR"), str(tmp_path / "home")) | {"WANDB_API_KEY": ""}
    done = run(*SMALL, "logger=wandb", f"hydra.run.dir={tmp_path / 'run'}", env=without)
    assert "Traceback" not in done.stderr
    assert "type `wandb login`, or give logger.wandb.offline=true." in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "override", "sentence"),
    [
        ("evaluate", "n_eval_tokens=0", "n_eval_tokens=0 must be null or a whole number of at least 1"),
        ("features", "latents=600", "latents=600 must be numbers between 0 and 511"),
        ("features", "n_tokens=abc", "n_tokens=abc must be a whole number of at least 1"),
    ],
)
def test_so_does_one_about_a_run(module, override, sentence, run_dir):
    assert_one_sentence(run(f"run_dir={run_dir}", override, module=module), sentence)


def test_a_mistake_gets_one_sentence_from_the_shell_too(tmp_path):
    """What libraries say at import would stand beside it."""
    assert_one_sentence(run("k=abc", f"hydra.run.dir={tmp_path}", shell=True), "k=abc must be a number")


def test_help_shows_every_option_with_its_comment_every_choice_and_examples():
    said = run("--help").stdout
    assert all(word in said for word in ("n_tokens", "hydra.run.dir", "sae=topk"))
    assert "\nseq_len: 128              # tokens per text row, BOS included\n" in said
    assert "\n  schedule: constant, cosine, cosine_restarts, warmup_decay\n" in said
    assert "\n  hydra/launcher: basic, gpus, shared_stream, slurm\n" in said
    assert "\n  hydra/sweeper: basic, reach_l0, search\n" in said
    assert {"matched/topk,", "route_layers,"} <= set(said.split())
    assert max(len(line) for line in said.splitlines()) <= 100
    assert not any(word in said for word in ("_linear", "defaults:", "\nhydra:"))


def test_the_package_itself_lists_every_command():
    done = subprocess.run([sys.executable, "-m", "sae_lab"], capture_output=True, text=True, check=True)
    listed = re.findall(r"^sae-lab (\w+) +\S.*\w", done.stdout, re.MULTILINE)
    package = Path(sae_lab.__file__).parent
    assert sorted(listed) == sorted(f.stem for f in package.glob("*.py") if "\n@entry_point(" in f.read_text())
    assert listed[0] == "train"


@pytest.mark.parametrize(
    ("module", "option", "choice"),
    [
        ("harvest", "verify: false             # true: do not harvest, only check", "  lm: gemma2_2b, gpt2,"),
        ("benchmark", "dead_share: 0.0           # share of the latents", "  sae: abs_batch_topk, abs_topk,"),
        ("report", "sweep_dir: ???", ""),
    ],
)
def test_help_of_other_entry_points_is_their_config(module, option, choice):
    said = run("--help", module=module).stdout
    assert f"\n{option}" in said
    assert choice in said
    assert ("Choices" in said) == bool(choice)
    assert not any(word in said for word in ("defaults:", "\nhydra:", "_linear", "  experiment"))
