"""What tests share: SAEs built from conf/sae/*.yaml as `train` builds them, and data with a planted dictionary."""

import atexit
import json
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

if "SAE_LAB_CACHE" not in os.environ:  # token stores, shared by all tests, workers and processes of a session
    os.environ["SAE_LAB_CACHE"] = tempfile.mkdtemp(prefix="sae_lab-tests-")
    atexit.register(shutil.rmtree, os.environ["SAE_LAB_CACHE"], ignore_errors=True)
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes started here: the workers share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for others leave them the cores
os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the hub's library is imported; no test may depend on a network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for test_sparse_triton.py; read once, when Lightning imports triton

import conf_files
import hydra
import pytest
import sketches
from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

import sae_lab.cli.entry  # noqa: F401 (registers the resolvers of conf/)
from sae_lab.cli.help import CONF
from sae_lab.runtime.build import build as build_node
from sae_lab.saes.base import BaseSAE
from sae_lab.sweeps.composition import SharedComposition

torch.set_num_threads(1)
sketches.draw_sketches()
conf_files.read_once()
pytest.register_assert_rewrite("small_runs", "groups")
pytest_plugins = ["process_guard"]

SAE_NAMES = sorted(p.stem for p in (CONF / "sae").glob("*.yaml") if not p.stem.startswith("_"))


@cache
def conf() -> SharedComposition:
    """The files of conf/, composed once for all tests of a worker that choose the same: 0.1 s each."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return SharedComposition(GlobalHydra.instance().config_loader())


def compose(*overrides: str, config_name: str = "train") -> DictConfig:
    """conf/ composed with overrides, as the command line does it."""
    cfg = conf().load_configuration(config_name, list(overrides), RunMode.RUN, from_shell=False)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def build(name: str, *overrides: str, d_in: int = 16, n_latents: int = 64, n_sources: int = 1) -> BaseSAE:
    """The SAE of conf/sae/<name>.yaml at small sizes."""
    cfg = compose(f"sae={name}", "k=4", *overrides)
    return build_node(cfg, "sae", d_in=d_in, n_latents=n_latents, n_sources=n_sources)


def forget_digests(folder: Path) -> Path:
    """Make an SAE folder one of before digests, in which only its other checks can notice a change."""
    description = json.loads((folder / "config.json").read_text())
    del description["digests"]
    (folder / "config.json").write_text(json.dumps(description))
    return folder


def dictionary(sae: BaseSAE) -> BaseSAE:
    """What holds the weights of an SAE's dictionary: itself, or the SAE that it routes to."""
    return getattr(sae, "inner", sae)


def planted(
    n: int, d_in: int = 16, n_features: int = 24, active: int = 3, n_sources: int = 1, seed: int = 0,
    signed: bool = False,
):  # fmt: skip
    """Rows that are sparse sums of known unit directions: (x (n, s, d), directions (features, s, d)).

    The directions are always the same; the seed is of the rows. The weights of a sum are positive unless signed.
    """
    directions = torch.randn(n_features, n_sources * d_in, generator=torch.Generator().manual_seed(12345))
    directions /= directions.norm(dim=-1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(n, n_features, generator=generator).topk(active, dim=-1).indices
    strengths = torch.zeros(n, n_features).scatter(-1, chosen, 1 + torch.rand(n, active, generator=generator))
    if signed:
        strengths *= 2.0 * torch.randint(2, strengths.shape, generator=generator) - 1
    return (strengths @ directions).view(n, n_sources, d_in), directions.view(n_features, n_sources, d_in)


def equal(a, b) -> bool:
    """Nested containers and tensors, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(params=SAE_NAMES)
def sae_name(request) -> str:
    return request.param


@pytest.fixture
def tiny_lm_folder() -> Path:
    import sae_lab.lm

    return Path(sae_lab.lm.__file__).parent / "tiny"


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory) -> Path:
    """A folder with a quick run at outputs/demo, trained once for all workers. Copy what you are going to change."""
    import shell

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "demo_run"
    with FileLock(f"{folder}.lock"):
        if not (folder / "outputs" / "demo" / "metrics.json").is_file():
            folder.mkdir(exist_ok=True)
            quick = ["experiment=quick_test", "n_tokens=4_096", "data.n_eval_tokens=1024", "hydra.run.dir=outputs/demo"]
            done = shell.run(*quick, cwd=folder)
            assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def fixed(monkeypatch):
    """Steps on a CPU in fixed-size mode, as on a GPU."""
    monkeypatch.setattr("sae_lab.training.step.has_fixed_size", lambda x: True)
