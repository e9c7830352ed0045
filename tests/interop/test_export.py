"""What we write in other formats, read back; what has no form there is refused; the card and the push."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import SAE_NAMES, build, compose, planted
from safetensors.torch import load_file
from shell import run
from test_load import CASES, FIXTURES, output, source

from sae_lab import load_sae
from sae_lab.interop import circuit_tracer, dictionary_learning, sae_lens, sparsify
from sae_lab.runs.card import LOADED_BY, how_to_load
from sae_lab.runs.export import WRITERS, export_sae, push_to_hub
from sae_lab.runtime.errors import UserError
from sae_lab.saes import MatryoshkaTopKSAE
from sae_lab.saes.cross_layer import CrossLayerTopKSAE
from sae_lab.saes.files import save_sae
from sae_lab.saes.parts.normalize import NORMALIZERS

PROVENANCE = {
    "model": {"name": "gpt2", "revision": None, "processing": "none"},
    "sites": ["transformer.h.7"],
    "bos": {"id": 50256, "policy": "first in every row"},
    "data": {"seq_len": 128, "exclude_bos": True, "exclude_first": 0, "path": "Skylion007/openwebtext"},
}
PROCESSED = {"fold_ln": True, "center_writing_weights": True}


def trained(name: str, *overrides: str):
    """An SAE whose every tensor is of its own, biases and thresholds included."""
    sae = build(name, *overrides)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            if key not in ("W_enc", "W_dec"):
                parameter.copy_(0.2 * torch.rand(parameter.shape, generator=generator))
    sae(planted(64)[0])
    return sae.eval()


def transcoder(name: str, *overrides: str, n_sources: int = 2):
    """One whose sites have units of their own, 10 and 0.1, and whose skip connection is not zero."""
    sae = build(name, "sae.n_inputs=1", "sae.encoder_bias=true", *overrides, n_sources=n_sources)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in sae.named_parameters():
            if key not in ("W_enc", "W_dec"):
                parameter.copy_(0.2 * torch.rand(parameter.shape, generator=generator))
    sae(planted(64, n_sources=n_sources)[0] * torch.tensor([10.0, 0.1, 1])[:n_sources, None])
    return sae.eval()


PLAIN = [
    name for name in SAE_NAMES if hasattr(build(name), "W_enc") and not build(name).signed
]  # a routed one, a search and signed codes have no form elsewhere


def test_tied_weights_go_out_twice(tmp_path):
    sae = trained("topk", "sae.tied=true", "sae.encoder_bias=true", "sae.normalize=none")
    sparsify.write(sae, tmp_path, PROVENANCE)
    x = planted(32)[0]
    torch.testing.assert_close(load_sae(tmp_path).encode(x), sae.encode(x))


def test_free_norms_survive_dictionary_learning(tmp_path):
    """Its AutoEncoder has its norms divided out when it is loaded, so such an SAE goes out as an AutoEncoderNew."""
    sae = trained("vanilla", "sae.unit_norm=false", "sae.normalize=none")
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, sae.n_latents).view(-1, 1, 1)
    dictionary_learning.write(sae, tmp_path, PROVENANCE)
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["dict_class"] == "AutoEncoderNew"
    x = planted(32)[0]
    torch.testing.assert_close(load_sae(tmp_path).encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", NORMALIZERS)
@pytest.mark.parametrize("name", PLAIN)
def test_sae_lens_files_compute_the_same(name, normalize, tmp_path):
    """P-25: mean_norm, which SAELens has by another name, goes out in the weights."""
    sae, x = trained(name, f"sae.normalize={normalize}"), 3 * planted(50)[0] + 1
    sae_lens.write(sae, tmp_path, PROVENANCE)
    back = load_sae(tmp_path)
    torch.testing.assert_close(back.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.reconstruct(x), sae.reconstruct(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "mean_norm", "centred", "whiten"])
@pytest.mark.parametrize("name", PLAIN)
def test_dictionary_learning_files_compute_the_same(name, normalize, tmp_path):
    sae, x = trained(name, f"sae.normalize={normalize}"), planted(50)[0]
    dictionary_learning.write(sae, tmp_path, PROVENANCE)
    back = load_sae(tmp_path)
    assert type(back) is type(sae.deployed())
    torch.testing.assert_close(back.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.reconstruct(x), sae.reconstruct(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sae",
    [
        trained("topk", "sae.normalize=none"),
        trained("topk", "sae.normalize=mean_norm"),
        MatryoshkaTopKSAE(k=4, d_in=16, n_latents=64, normalize="none"),
    ],
    ids=["topk", "topk_mean_norm", "matryoshka_topk"],
)
def test_sparsify_files_compute_the_same(sae, tmp_path):
    x = planted(50)[0]
    sparsify.write(sae.eval(), tmp_path, PROVENANCE)
    back, free = load_sae(tmp_path), sae.config["normalize"] == "mean_norm"
    torch.testing.assert_close(back.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.reconstruct(x), sae.reconstruct(x), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_decoder"] != free


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_scale_goes_out_in_the_weights_and_stays_in_the_sae(tied, tmp_path):
    """W_enc / scale, W_dec · scale, b_dec · scale; tied weights part, as one grows and the other shrinks."""
    sae = build("topk", f"sae.tied={tied}", "sae.encoder_bias=true", "sae.normalize=mean_norm")
    sae(100 * planted(64)[0])
    with torch.no_grad():
        sae.b_dec += torch.linspace(-1, 1, 16)
    before, scale = {name: t.clone() for name, t in sae.state_dict().items()}, sae.sources.normalizer.scale.item()
    assert scale > 10
    sparsify.write(sae.eval(), tmp_path, PROVENANCE)
    theirs = load_file(tmp_path / "sae.safetensors")
    torch.testing.assert_close(theirs["encoder.weight"], sae.W_enc[:, 0].detach() / scale)
    torch.testing.assert_close(theirs["W_dec"], sae.W_dec[:, 0].detach() * scale)
    torch.testing.assert_close(theirs["b_dec"], sae.b_dec[0].detach() * scale)
    assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())


def test_an_sae_that_has_no_scale_yet_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="mean_norm has no scale before training"):
        sparsify.write(build("topk", "sae.normalize=mean_norm").eval(), tmp_path, PROVENANCE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("skip", ["true", "false"])
@pytest.mark.parametrize("normalize", ["none", "mean_norm", "centred", "whiten"])
@pytest.mark.parametrize(
    ("format", "name", "said"),
    [
        (sae_lens, "vanilla", {"architecture": "transcoder"}),
        (sae_lens, "jumprelu", {"architecture": "jumprelu_transcoder"}),
        (sae_lens, "batch_topk", {"architecture": "jumprelu_transcoder"}),
        (sae_lens, "matryoshka", {"architecture": "jumprelu_transcoder"}),
        (sparsify, "topk", {"transcode": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_transcoders_compute_the_same_elsewhere(format, name, said, normalize, skip, tmp_path):
    sae = transcoder(name, f"sae.normalize={normalize}", f"sae.skip={skip}")
    x = 3 * planted(50, seed=1)[0] + 1
    format.write(sae, tmp_path, PROVENANCE)
    back, config = load_sae(tmp_path), json.loads((tmp_path / "cfg.json").read_text())
    assert 0 < (sae.encode(x) > 0).sum() < 50 * 64
    torch.testing.assert_close(back.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(back.predict(x), sae.predict(x), rtol=1e-5, atol=1e-5)
    assert (back.n_sources, back.n_inputs, back.skip) == (2, 1, skip == "true")
    if skip == "true":
        said = {key: value if value is True else value.replace("trans", "skip_trans") for key, value in said.items()}
    assert {key: config[key] for key in said} == said


@pytest.mark.parametrize("normalize", ["centred", "whiten"])
def test_a_mean_goes_out_in_the_biases(normalize, tmp_path):
    """b_dec of an SAE takes all of it; a transcoder reads without b_dec, so it gets a b_enc where it had none."""
    x = 3 * planted(50, n_sources=2, seed=1)[0] + 5
    sae = build("topk", f"sae.normalize={normalize}")
    sae(x[:, :1])
    sparsify.write(sae.eval(), tmp_path / "sae", PROVENANCE)
    assert not load_file(tmp_path / "sae" / "sae.safetensors")["encoder.bias"].any()
    crossing = build("topk", f"sae.normalize={normalize}", "sae.n_inputs=1", n_sources=2)
    crossing(x)
    sparsify.write(crossing.eval(), tmp_path / "transcoder", PROVENANCE)
    torch.testing.assert_close(load_sae(tmp_path / "transcoder").predict(x), crossing.predict(x), rtol=1e-4, atol=1e-4)
    assert load_file(tmp_path / "transcoder" / "sae.safetensors")["encoder.bias"].all()


def test_the_two_scales_of_a_transcoder_go_out_in_its_weights(tmp_path):
    """s_x divides what it reads, s_y multiplies what it predicts, and W_skip leads from the one to the other."""
    sae = transcoder("topk", "sae.normalize=mean_norm", "sae.skip=true")
    s_x, s_y = sae.sources.normalizer.scale.item(), sae.sources.target_normalizer.scale.item()
    assert s_x > 50 * s_y > 0
    sparsify.write(sae, tmp_path, PROVENANCE)
    theirs = load_file(tmp_path / "sae.safetensors")
    torch.testing.assert_close(theirs["encoder.weight"], sae.W_enc[:, 0].detach() / s_x)
    torch.testing.assert_close(theirs["encoder.bias"], sae.b_enc.detach())
    torch.testing.assert_close(theirs["W_dec"], sae.W_dec[:, 0].detach() * s_y)
    torch.testing.assert_close(theirs["b_dec"], sae.b_dec[0].detach() * s_y)
    torch.testing.assert_close(theirs["W_skip"], sae.W_skip.detach() * s_y / s_x)


def test_a_transcoder_of_sae_lens_names_both_sites(tmp_path):
    sites = ["blocks.3.mlp.hook_in", "transformer.h.3"]
    sae_lens.write(transcoder("vanilla", "sae.normalize=none"), tmp_path, PROVENANCE | {"sites": sites})
    config = json.loads((tmp_path / "cfg.json").read_text())
    hooks = {key: value for key, value in config["metadata"].items() if "hook_name" in key}
    assert hooks == {
        "hook_name": "blocks.3.mlp.hook_in",
        "hf_hook_name": None,
        "hook_name_out": "blocks.3.hook_resid_post",
        "hf_hook_name_out": "transformer.h.3",
    }
    assert (config["d_in"], config["d_out"], config["apply_b_dec_to_input"]) == (16, 16, False)


@pytest.mark.parametrize(
    ("format", "sae", "sentence"),
    [
        (
            sae_lens,
            build("topk", "sae.n_inputs=1", "sae.normalize=none", n_sources=2),
            "class TopKSAE: use format=sparsify",
        ),
        (
            sae_lens,
            build("gated", "sae.n_inputs=1", "sae.normalize=none", n_sources=2),
            "class GatedSAE: no format can",
        ),
        (sae_lens, transcoder("vanilla", "sae.normalize=none", n_sources=3), "SAELens .* from 1 to 2 sites"),
        (sparsify, transcoder("topk", "sae.normalize=none", n_sources=3), "sparsify .* from 1 to 2 sites"),
        (
            sparsify,
            transcoder("jumprelu", "sae.normalize=none"),
            "sparsify .* class JumpReLUSAE: use format=sae_lens or",
        ),
        (
            sparsify,
            CrossLayerTopKSAE(k=4, d_in=16, n_latents=64, n_sources=2, normalize="none"),
            "class CrossLayerTopKSAE",
        ),
        (
            sae_lens,
            CrossLayerTopKSAE(k=4, d_in=16, n_latents=64, n_sources=4, normalize="none"),
            "class CrossLayerTopKSAE",
        ),
        (dictionary_learning, transcoder("topk", "sae.normalize=none"), "dictionary_learning .* use format=sparsify"),
        (dictionary_learning, transcoder("jumprelu", "sae.normalize=none"), "dictionary_learning .* format=sae_lens"),
    ],
)
def test_a_transcoder_that_has_no_form_there_is_refused(format, sae, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as caught:
        format.write(sae.eval(), tmp_path, {})
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


ELSEWHERE = {case: sparsify if case.startswith("sparsify") and "transcoder" in case else sae_lens for case in CASES}
"""SAELens has every fixture but TopK transcoders."""


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_sae_goes_on(case, tmp_path):
    """In by one format and out by another: the codes stay those of the library that it comes from."""
    expected = load_file(FIXTURES / case / "expected.safetensors")
    ELSEWHERE[case].write(load_sae(source(case)), tmp_path, {})
    back = load_sae(tmp_path)
    torch.testing.assert_close(back.encode(expected["x"]), expected["code"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(back, expected["x"]), expected["x_hat"], rtol=1e-5, atol=1e-5)


def test_batch_topk_goes_out_as_jumprelu_at_its_threshold(tmp_path):
    sae = trained("batch_topk", "sae.normalize=none")
    sae_lens.write(sae, tmp_path, PROVENANCE)
    config, back = json.loads((tmp_path / "cfg.json").read_text()), load_sae(tmp_path)
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["sae_lab_class"] == "BatchTopKSAE"
    assert torch.equal(back.thresholds, sae.threshold.expand(64))


@pytest.mark.parametrize(
    ("sites", "processing", "hook", "hf_hook", "kwargs"),
    [
        (["transformer.h.7"], "none", "blocks.7.hook_resid_post", "transformer.h.7", {}),
        (["gpt_neox.layers.3"], "none", "blocks.3.hook_resid_post", "gpt_neox.layers.3", {}),
        (["model.layers.3.mlp"], "none", "model.layers.3.mlp", None, {}),
        (["blocks.8.hook_resid_pre"], "layer norms folded", "blocks.8.hook_resid_pre", None, PROCESSED),
    ],
)
def test_metadata_says_where_the_activations_come_from(sites, processing, hook, hf_hook, kwargs):
    said = sae_lens.metadata(PROVENANCE | {"sites": sites, "model": {"name": "gpt2", "processing": processing}})
    assert (said["hook_name"], said["hf_hook_name"], said["model_from_pretrained_kwargs"]) == (hook, hf_hook, kwargs)
    assert (said["model_name"], said["context_size"], said["prepend_bos"]) == ("gpt2", 128, True)
    assert (said["dataset_path"], said["exclude_special_tokens"]) == ("Skylion007/openwebtext", True)


@pytest.mark.parametrize(
    ("write", "sae", "sentence"),
    [
        (sparsify.write, build("batch_topk"), "sparsify cannot represent a BatchTopKSAE"),
        (sparsify.write, build("topk"), "sae.normalize=per_token: train with sae.normalize=none or mean_norm"),
        (dictionary_learning.write, build("batch_topk", "k=1.5", "sae.normalize=none"), "k=1.5: k must be an integer"),
        (sae_lens.write, build("topk", n_sources=2), "an SAE of 2 sites"),
        (
            sae_lens.write,
            build("matryoshka", "sae.active_groups=1"),
            "active_groups=1: save it with active_groups=null",
        ),
        *(
            (module.write, build("abs_topk", "sae.normalize=none"), r"cannot represent sae\.signed=true")
            for module in (sae_lens, sparsify, dictionary_learning)
        ),
        (sae_lens.write, build("abs_batch_topk", "sae.normalize=none"), r"SAELens cannot represent sae\.signed=true"),
        (
            circuit_tracer.write,
            build("matryoshka", "sae.signed=true", "sae.normalize=none", "sae.n_inputs=1", n_sources=2),
            r"circuit-tracer cannot represent sae\.signed=true",
        ),
    ],
)
def test_what_has_no_form_there_is_refused(write, sae, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        write(sae.eval(), tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_the_format_does_not_know_stops_the_export(tmp_path):
    sae = build("topk")
    sae.register_buffer("gain", torch.ones(64))
    with pytest.raises(UserError, match="unknown meaning, gain"):
        sae_lens.write(sae.eval(), tmp_path, {})


@pytest.fixture
def run_dir(tmp_path):
    """What a run leaves behind, in small."""
    folder = tmp_path / "run"
    save_sae(trained("batch_topk"), folder / "sae", PROVENANCE, probe_rows=planted(16)[0])
    (folder / "metrics.json").write_text('{"fvu": 0.125, "n_eval_tokens": 2048, "train_mode": {}}')
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("k: 4\n")
    (folder / "figures").mkdir()
    (folder / "figures" / "latent_density.png").write_bytes(b"png")
    return folder


@pytest.mark.parametrize("format", ["sae_lens", "sae_lab"])
def test_an_export_has_weights_figures_and_a_card(format, run_dir, tmp_path):
    export_sae(run_dir, format, tmp_path / "out")
    x = planted(20, seed=1)[0]
    torch.testing.assert_close(load_sae(tmp_path / "out").encode(x), load_sae(run_dir).encode(x))
    card = (tmp_path / "out" / "README.md").read_text()
    rows = ("class | BatchTopKSAE", "latents | 64", "k | 4", "model | gpt2", "processing of the model | none")
    rows += ("text | Skylion007/openwebtext", "left out | exclude_bos=True", "fvu | 0.125", "n_eval_tokens | 2,048")
    assert [row for row in rows if f"\n| {row} |\n" not in card] == []
    assert "# BatchTopKSAE of gpt2 at transformer.h.7" in card
    assert "k: 4" in card
    assert ('SAE.load_from_disk("<this folder>")' in card) == (format == "sae_lens")
    assert "transcoder" not in card
    assert "![latent_density](figures/latent_density.png)" in card
    assert (tmp_path / "out" / "figures" / "latent_density.png").read_bytes() == b"png"
    assert (tmp_path / "out" / "probe.safetensors").is_file() == (format == "sae_lab")


def test_the_card_of_a_transcoder_says_what_is_read_and_what_is_predicted(tmp_path):
    sites = ["blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"]
    sae, x = transcoder("batch_topk", "sae.normalize=mean_norm", "sae.skip=true"), planted(20, seed=1)[0]
    save_sae(sae, tmp_path / "run" / "sae", PROVENANCE | {"sites": sites})
    export_sae(tmp_path / "run", "sae_lens", tmp_path / "out")
    assert (
        "\nA transcoder: from activations at `blocks.3.mlp.hook_in` it predicts those at `blocks.3.hook_mlp_out`, "
        "`sae.predict(x)`.\n"
    ) in (tmp_path / "out" / "README.md").read_text()
    torch.testing.assert_close(load_sae(tmp_path / "out").predict(x), sae.predict(x))


@pytest.mark.parametrize("format", WRITERS)
def test_the_card_of_every_format_says_how_its_library_loads_it(format):
    library, code = LOADED_BY[format]
    compile(code, library, "exec")
    assert f"With {library}:" in how_to_load(format, None)


@pytest.mark.parametrize("format", ["openai", "gemma_scope"])
def test_what_is_read_only_is_not_written(format, run_dir, tmp_path):
    with pytest.raises(UserError, match=f"format={format} is not known: choose one of"):
        export_sae(run_dir, format, tmp_path / "out")


def test_the_card_does_not_tell_of_the_machine(run_dir, tmp_path):
    """Neither where the run and its logs went, nor in which folders its model and text lie."""
    model, data = {"name": "/home/me/models/gpt2"}, {"paths": ["/mnt/secret/corpus/*.txt", "texts/*.txt"]}
    save_sae(trained("batch_topk"), run_dir / "sae", PROVENANCE | {"model": model, "data": data})
    config = {"k": 4, "run_dir": "/home/me/run", "logger": {"wandb": {"project": "mine"}}, "init_from": "~/old/sae"}
    config |= {"lm": model, "data": data, "optimizer": {"_target_": "torch.optim.Adam", "betas": [0.9, 0.99]}}
    (run_dir / ".hydra" / "config.yaml").write_text(json.dumps(config))
    export_sae(run_dir, "sae_lens", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    said = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert said.keys() == config.keys() - {"run_dir", "logger"}
    assert (said["init_from"], said["lm"]["name"], said["data"]["paths"]) == ("sae", "gpt2", ["*.txt", "texts/*.txt"])
    assert said["optimizer"] == config["optimizer"]
    assert "# BatchTopKSAE of gpt2 at" in card
    assert [word for word in ("/home", "/mnt", "~", "wandb") if word in card] == []


@pytest.mark.parametrize("private", [True, False])
def test_what_is_pushed_is_pulled_again(private, run_dir, tmp_path, monkeypatch):
    """A hub of folders: the repository has every file of the export, and loads by its name."""
    hub, made = tmp_path / "hub", {}

    def create(self, repo, private, exist_ok):
        assert exist_ok
        made[repo] = private
        (hub / repo).mkdir(parents=True)

    def commit(self, repo_id, operations, commit_message):
        for added in operations:
            (hub / repo_id / added.path_in_repo).parent.mkdir(exist_ok=True)
            shutil.copy(added.path_or_fileobj, hub / repo_id / added.path_in_repo)
        return SimpleNamespace(commit_url="address")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", commit)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, allow_patterns: str(hub / repo))
    files = export_sae(run_dir, "sae_lens", tmp_path / "out")
    assert push_to_hub(tmp_path / "out", files, "me/sae", private) == "address"
    assert made == {"me/sae": private}
    assert all((hub / "me/sae" / file.relative_to(tmp_path / "out")).is_file() for file in files)
    x = planted(20, seed=1)[0]
    torch.testing.assert_close(load_sae("me/sae").encode(x), load_sae(run_dir).encode(x))


@pytest.mark.process
def test_without_network_the_folder_is_written_and_the_push_says_so(run_dir):
    done = run(f"run_dir={run_dir}", "push_to_hub=me/sae", module="export")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "is written, but was not pushed to me/sae" in done.stderr
    assert done.stderr.strip().endswith("log in with `hf auth login`, then type the same command again.")
    assert "To me/sae, private if it is created now, go 4 files:" in done.stdout
    assert load_sae(run_dir / "export" / "sae_lens").n_latents == 64


def test_a_repository_is_private_unless_one_says_otherwise():
    assert compose("run_dir=x", config_name="export").private is True


def test_an_unknown_format_is_refused(run_dir, tmp_path):
    with pytest.raises(UserError, match="format=onnx is not known: choose one of sae_lens, sparsify, dictionary_learn"):
        export_sae(run_dir, "onnx", tmp_path / "out")
