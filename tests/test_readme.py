"""README: its Python runs, its links lead somewhere, it is short; the SAE of docs/extending.md works as printed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shell import run

pytestmark = pytest.mark.process

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
EXTENDING = (REPOSITORY / "docs" / "extending.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.fixture(scope="module")
def own_sae() -> tuple[str, str]:
    """The SAE of docs/extending.md, verbatim: its .py and its .yaml."""
    code = next(block for block in blocks("python", EXTENDING) if "class RelativeSAE" in block)
    return code, next(block for block in blocks("yaml", EXTENDING) if "RelativeSAE" in block)


def test_the_documented_sae_passes_every_contract_test_with_no_other_edit(own_sae, tmp_path):
    for name in ("sae_lab", "conf", "tests"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for path, text in zip(("sae_lab/saes/relative.py", "conf/sae/relative.yaml"), own_sae, strict=True):
        (tmp_path / path).write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/saes/test_contract.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*command, "-k", "relative"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20


def test_the_documented_sae_works_from_folders_of_its_users(own_sae, tmp_path):
    code, settings = own_sae
    for path, text in {
        "my_saes/relative.py": code,
        "my_conf/sae/relative.yaml": settings.replace("sae_lab.saes", "my_saes"),
    }.items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(text)
    quick = ["experiment=quick_test", "n_tokens=8_192", "data.n_eval_tokens=1024", "hydra.run.dir=own"]
    trained = run("--config-dir", "my_conf", "sae=relative", *quick, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    metrics = (tmp_path / "own" / "metrics.json").read_text()
    refused = run("run_dir=own", module="evaluate", cwd=tmp_path)
    assert "add trust=my_saes.relative." in refused.stderr
    evaluated = run("run_dir=own", "trust=my_saes.relative", module="evaluate", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert (tmp_path / "own" / "metrics.json").read_text() == metrics


def test_the_readmes_python_runs(demo_run, monkeypatch):
    monkeypatch.chdir(demo_run)
    code = next(b for b in blocks("python") if "load_run" in b)
    names: dict = {}
    exec(code, names)
    n, t = names["tokens"].shape
    assert n * t == 1024
    assert names["x"].shape == names["x_hat"].shape == (n * t, 1, 128)
    assert names["code"].shape == (n * t, names["sae"].n_latents)
    assert names["run"].metrics["l0"] == pytest.approx(8, rel=0.1)
    assert (names["run"].folder / "metrics.json").is_file()


def test_the_readmes_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (REPOSITORY / link).is_file()] == []


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1400
