"""What leaves the machine holds no secret, no value of the environment, no folder and no user of it."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from omegaconf import OmegaConf
from shell import run

import sae_lab.lm
from sae_lab.runs.config import read_config, read_environment_keys
from sae_lab.runs.export import describe_upload, export_sae, push_to_hub
from sae_lab.runs.loading import load_run
from sae_lab.runtime.private import HIDDEN, keys_from_environment, private_values, public, public_path, public_text
from sae_lab.saes.files import load_sae_folder
from sae_lab.sweeps.labels import label_jobs
from sae_lab.sweeps.table import collect_table, complete_jobs

HEX = "0123456789abcdef0123456789abcdef01234567"
SECRETS = {
    "hub": "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "openai": "sk-proj-AbCdEfGhIjKlMnOpQrSt",
    "github": "ghp_AbCdEfGhIjKlMnOpQrStUvWx",
    "wandb": HEX,
    "aws_id": "AKIAIOSFODNN7EXAMPLE",
    "aws": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "url": "https://zmallory:hunter22@example.org/x?token=hunter23&page=2",
}
NAMED = ["hf_token", "accessToken", "wandb_api_key", "db_password", "client_secret", "aws.secret_access_key"]
FORMATS = ("sae_lens", "sparsify", "dictionary_learning", "sae_lab")
PRIVATE = [*SECRETS.values(), "zmallory", "hunter2", "named-s3cret", "env-s3cret", "zalice", "/home/"]


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_a_secret_is_known_by_its_form_wherever_it_stands(secret):
    for value in (secret, f"see {secret}, twice: {secret}", [1, {"a": secret}], {"a": {"b": [secret]}}):
        said = json.dumps([public(value), public({"note": value}), public_text(str(value))])
        assert [word for word in (secret, "hunter2", "zmallory") if word in said] == []
        assert HIDDEN in said


@pytest.mark.parametrize("key", [*NAMED, "lm.token", "credentials", "proxy.authorization"])
def test_a_secret_is_known_by_its_name(key):
    parent, _, leaf = key.rpartition(".")
    settings = {leaf: "x1", "page": "x2"}
    assert public({parent: settings} if parent else settings) == (
        {parent: {leaf: HIDDEN, "page": "x2"}} if parent else {leaf: HIDDEN, "page": "x2"}
    )
    assert "x1" not in public_text(f"{key}=x1 is wrong") + public_text(f"{key}: x1")


@pytest.mark.parametrize(
    "settings",
    [
        {"n_tokens": 5, "block_tokens": 6, "tokenizer": {"name": "gpt2"}, "normalize": "per_token"},
        {"token": None, "hf_token": True, "bos_token": "<s>", "token_ids": [1]},
        {"commit": f"{HEX}-dirty", "lm": {"revision": HEX, "name": "google/gemma-2-2b"}},
        {"path": "Skylion007/openwebtext", "url": "s3://bucket/cache", "glob": "texts/**/*.txt", "sites": ["blocks.3"]},
        {"_target_": "torch.optim.Adam", "betas": [0.9, 0.999], "k": 8, "lr": 1e-3, "note": "a/b and 1/2"},
    ],
)
def test_what_an_experiment_is_made_of_stays(settings):
    assert public(settings) == settings


@pytest.fixture
def at_home(tmp_path, monkeypatch) -> Path:
    """The working directory of a user named zalice."""
    project = tmp_path / "home" / "zalice" / "project"
    project.mkdir(parents=True)
    move_in(monkeypatch, project)
    return project


def move_in(monkeypatch, project: Path) -> None:
    monkeypatch.chdir(project)
    for name, value in environment(project).items():
        monkeypatch.setenv(name, value)


def environment(project: Path) -> dict[str, str]:
    return {"HOME": str(project.parent), "USER": "zalice", "LOGNAME": "zalice", "MY_SECRET": "env-s3cret"}


def test_a_path_is_shown_from_the_working_directory_or_by_its_last_part(at_home):
    shown = {
        f"{at_home}/texts/a b.txt": "texts/a b.txt",
        str(at_home): ".",
        str(at_home.parent): HIDDEN,
        f"{at_home.parent}/models/gpt2": "gpt2",
        "/data/zalice/x.txt": "x.txt",
        "~/models/gpt2": "gpt2",
        "../other/x.txt": "x.txt",
        f"file://{at_home}/texts/a.txt": "texts/a.txt",
        f"{at_home}/runs/name=_home_zalice_x": HIDDEN,
        "/mnt/corpus/**/*.txt": "*.txt",
    }
    assert {path: public({"paths": [path]})["paths"][0] for path in shown} == shown
    assert {path: public_path(path) for path in shown} == shown
    sentence = public_text(f"OSError: {at_home.parent}/m/x.bin is no file, nor '/data/zalice/y'; try ~/z (k=1).")
    assert sentence == "OSError: x.bin is no file, nor 'y'; try z (k=1)."


def test_keys_that_depend_on_the_environment_are_found(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "env-s3cret")
    monkeypatch.setenv("MY_NUMBER", "7")
    raw = {
        "a": "${oc.env:MY_SECRET}",
        "b": ["x", "run-${a}"],
        "c": "${d}",
        "d": {"e": "${a}"},
        "n": "${oc.decode:${oc.env:MY_NUMBER}}",
        "default": "${oc.env:NOT_SET,mine}",
        "k": 4,
        "same_k": "${k}",
    }
    cfg = OmegaConf.create(raw)
    keys = keys_from_environment(cfg)
    assert keys == ["a", "b[1]", "c", "d.e", "n", "default"]
    plain = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert set(private_values(plain, keys)) == {"env-s3cret", "run-env-s3cret", "mine"}
    shown = public(OmegaConf.to_container(plain), keys)
    assert "env-s3cret" not in str(shown)
    assert (shown["n"], shown["k"], shown["same_k"], shown["b"][0]) == (7, 4, 4, "x")
    assert cfg.a == "env-s3cret"
    assert keys_from_environment(OmegaConf.create({"a": "${b}", "b": 1})) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with a secret wherever a user could put one, in the working directory of zalice."""
    project = tmp_path_factory.mktemp("private") / "home" / "zalice" / "project"
    model, texts = project.parent / "models" / "mymodel", project.parent / "corpus"
    for folder in (project, texts):
        folder.mkdir(parents=True)
    shutil.copytree(Path(sae_lab.lm.__file__).parent / "tiny", model)
    for i in range(8):
        (texts / f"{i}.md").write_text(Path(__file__).read_text())
    secrets = [f"+notes.{name}='{secret}'" for name, secret in SECRETS.items()]
    secrets += [f"+{name}=named-s3cret{i}" for i, name in enumerate(NAMED)]
    settings = ["experiment=quick_test", "sae=topk", "k=4", "expansion=1", "sae.normalize=none", "n_tokens=1024"]
    settings += ["data=text_files", f"data.paths=[{texts}/*.md]", f"lm.name={model}", "data.repeat=true"]
    settings += ["batch_size=256", "data.block_tokens=1024", "data.n_eval_tokens=256", "data.n_val_tokens=128"]
    settings += ["logger=tensorboard", "+mine.env=${oc.env:MY_SECRET}", "+mine.again=[x,'${mine.env}']"]
    name = f"data.paths=[{texts}/*.md],hf_token=named-s3cret0,k=4".replace("/", "_")
    done = run(
        *settings, *secrets, f"hydra.run.dir='{project / 'sweep' / name}'", cwd=project, env=environment(project)
    )
    assert done.returncode == 0, done.stderr
    return project / "sweep" / name


@pytest.fixture
def at_run(trained, monkeypatch) -> Path:
    move_in(monkeypatch, trained.parents[1])
    return trained


def assert_public(*files: Path) -> None:
    """No file holds anything private, in its name or content."""
    assert files
    for file in files:
        content = file.read_bytes()
        assert [word for word in PRIVATE if word.encode() in content or word in file.name] == [], file


pytestmark = pytest.mark.process


def test_provenance_and_what_loggers_send_are_public(at_run):
    assert_public(at_run / "sae" / "config.json", at_run / "tensorboard" / "hparams.yaml")
    said = json.loads((at_run / "sae" / "config.json").read_text())["provenance"]
    assert said["lm"]["name"] == said["model"]["name"] == said["tokenizer"]["name"] == "mymodel"
    assert said["data"]["paths"] == ["*.md"]
    sent = yaml.safe_load((at_run / "tensorboard" / "hparams.yaml").read_text())
    assert sent["mine"] == {"env": HIDDEN, "again": ["x", HIDDEN]}


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_and_its_card_are_public(format, at_run, tmp_path):
    description, record = at_run / "sae" / "config.json", at_run / "digests.json"
    before, recorded = description.read_text(), record.read_text()
    old = json.loads(before)  # of a version that wrote provenance as it was
    old["provenance"]["lm"] |= {"name": "/home/zalice/models/mymodel", "token": "named-s3cret"}
    del old["digests"]
    description.write_text(json.dumps(old))
    record.unlink()  # nor did it write one
    try:
        files = export_sae(at_run, format, tmp_path / "out")
    finally:
        description.write_text(before)
        record.write_text(recorded)
    assert_public(*files)
    card = (tmp_path / "out" / "README.md").read_text()
    shown = yaml.safe_load(card.split("```yaml")[1].split("```")[0])
    assert (shown["mine"]["env"], shown["hf_token"], shown["k"]) == (HIDDEN, HIDDEN, 4)
    if format == "sae_lab":
        load_sae_folder(tmp_path / "out")


def test_an_sae_with_digests_is_exported_with_digests_that_fit(at_run, tmp_path):
    export_sae(at_run, "sae_lab", tmp_path)
    assert "digests" in json.loads((tmp_path / "config.json").read_text())
    load_sae_folder(tmp_path)


def test_the_report_is_public(at_run):
    sweep = at_run.parent
    waiting = f"data.paths=[{sweep.parents[1]}/b.md],lm.token=named-s3cret".replace("/", "_")
    failed = sweep / waiting.replace("lm.token", "hf_token")
    (failed / ".hydra").mkdir(parents=True)
    shutil.copy(at_run / ".hydra" / "config.yaml", failed / ".hydra")
    shutil.copy(at_run / ".hydra" / "from_environment.txt", failed / ".hydra")
    (failed / "failed.txt").write_text(f"{sweep}/x.txt and env-s3cret and {SECRETS['hub']} are wrong\n")
    (sweep / "jobs.txt").write_text(f"{at_run.name}\n{failed.name}\n{waiting}\n")
    done = run(f"sweep_dir={sweep}", module="report", cwd=sweep.parent, env=environment(sweep.parent))
    assert done.returncode == 0, done.stderr
    assert_public(sweep / "report.csv", sweep / "report.md", *(sweep / "figures").glob("*"), sweep / "report.csv")
    row = pd.read_csv(sweep / "report.csv").set_index("status").loc["complete"]
    assert (row["mine.env"], row["hf_token"], row["data.paths"]) == (HIDDEN, HIDDEN, "[*.md]")
    assert row["job"] == f"data.paths=[*.md],hf_token={HIDDEN},k=4"
    text = (sweep / "report.md").read_text()
    assert "failed sweep/x.txt and (hidden) and (hidden) are wrong" in text
    assert f"- data.paths=\\[b.md\\],lm.token={HIDDEN}: waiting" in text


def test_the_runs_own_config_keeps_what_resuming_needs(at_run):
    config = read_config(at_run)
    assert config.mine.env == "env-s3cret"
    assert config.notes.hub == SECRETS["hub"]
    assert read_environment_keys(at_run) == ["mine.env", "mine.again[1]"]
    sae, data, _ = load_run(at_run, device="cpu")
    assert sae.d_in == data.d_in


def test_jobs_that_differ_in_a_folder_or_a_secret_are_no_repeats(at_run, tmp_path):
    for i, (path, secret) in enumerate([("/a/x.md", "s1"), ("/b/x.md", "s1"), ("/b/x.md", "s2"), ("/b/x.md", "s2")]):
        folder = shutil.copytree(at_run / ".hydra", tmp_path / str(i) / ".hydra").parent
        shutil.copy(at_run / "metrics.json", folder)
        config = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text())
        config["data"]["paths"], config["hf_token"] = [path], secret
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    table = collect_table(tmp_path)
    assert table["data.paths"].tolist() == ["[x.md] #1", "[x.md] #2", "[x.md] #2", "[x.md] #2"]
    assert table["hf_token"].tolist() == ["(hidden) #1", "(hidden) #1", "(hidden) #2", "(hidden) #2"]
    assert complete_jobs(table)["job"].tolist() == ["0", "1", "2"]


def test_a_plan_names_variables_and_no_values(tmp_path):
    done = run("-m", "k=0,-1", "+note=${oc.env:PLANNED}", f"hydra.sweep.dir={tmp_path}", env={"PLANNED": "env-s3cret"})
    assert done.returncode == 1
    planned = (tmp_path / "jobs.txt").read_text()
    assert planned.count("oc.env") == 2
    assert "env-s3cret" not in planned + "".join(folder.name for folder in tmp_path.iterdir())
    assert all((tmp_path / name / "failed.txt").is_file() for name in planned.splitlines())


def test_a_job_is_shown_without_folders(at_home):
    names = [
        "data.paths=[_home_zalice_a_x.txt,y_z.txt],k=4",
        "optimizer._target_=torch.optim.Adam",
        "k=8,sae=batch_topk",
    ]
    assert label_jobs(names) == ["data.paths=[x.txt,y_z.txt],k=4", *names[1:]]


def test_only_the_files_of_the_export_are_listed_and_sent(at_run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    foreign = [out / ".env", out / "secrets.json", out / "other.safetensors", out / "figures" / "mine.png"]
    for file in foreign:
        file.write_text("mine")
    (tmp_path / "key").write_text("mine")
    (out / "link.json").symlink_to(tmp_path / "key")
    sent = {}

    def commit(self, repo_id, operations, commit_message):
        sent.update({added.path_in_repo: Path(added.path_or_fileobj).stat().st_size for added in operations})
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", commit)
    files = export_sae(at_run, "sae_lens", out)
    listed = describe_upload(out, files, "me/sae", private=True)
    with pytest.raises(Exception, match="was not pushed"):
        push_to_hub(out, files, "me/sae", private=True)
    figures = {f"figures/{file.name}" for file in (at_run / "figures").glob("*.png")}
    assert sent.keys() == {"README.md", "cfg.json", "sae_weights.safetensors", *figures}
    assert listed.splitlines()[0] == f"To me/sae, private if it is created now, go {len(sent)} files:"
    for name, size in sent.items():
        assert f"{size:>15,} bytes  {name}" in listed
