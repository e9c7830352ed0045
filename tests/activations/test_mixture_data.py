"""`data=mixture`: parts filled in from conf/, resolved into the run's config, trained on, harvested, and resumed."""

import json
import re
import signal
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import compose, equal
from fakes import SETTINGS, Echo, Numbers
from groups import SMALL
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError
from shell import run
from small_runs import assert_continues_to_the_bits_of, assert_one_sentence

from sae_lab.activations.from_text import from_documents
from sae_lab.activations.mixture import mixture
from sae_lab.cache.key import data_key
from sae_lab.cli.entry import entry_point  # noqa: F401 (registers the resolver)
from sae_lab.cli.explain import explain
from sae_lab.cli.help import CONF
from sae_lab.runs.config import bring_up_to_date
from sae_lab.runtime.build import build
from sae_lab.runtime.errors import SettingError, UserError
from sae_lab.text import bundled
from sae_lab.text.shares import next_parts

TEXT = "sae_lab.activations.from_text"
LIST = "data.parts=[{data: stdlib, held_out_every: 5}, {data: fineweb}]"
NAMED = "data.parts={code: {data: stdlib}, web: {data: hub, path: a/b}}"


def sources(*overrides: str):
    return resolved(*overrides)["data"]["sources"]


def resolved(*overrides: str):
    return OmegaConf.to_container(compose("data=mixture", "run_dir=run", *overrides), resolve=True)


def numbers(lm, make, seed: int, n_documents: int = 12, **stream):
    """A function such as those of from_text.py."""
    return from_documents(lm, partial(Numbers, n_documents=n_documents), make=make, seed=seed, **stream)


def small(weights=None, parts=None, **changes):
    parts = parts or {"many": partial(numbers, n_documents=40), "few": numbers}
    return mixture(Echo(), parts, weights, order="shuffled", **(SETTINGS | changes))


# ---- the config


def test_unset_keys_of_a_part_are_those_of_its_choice():
    code, web = sources(LIST)
    assert code == {"_target_": f"{TEXT}.stdlib", "_partial_": True, "held_out_every": 5}
    assert (web["_target_"], web["path"], web["name"]) == (f"{TEXT}.hub", "HuggingFaceFW/fineweb", "sample-10BT")
    whole = {"seq_len", "batch_size", "order", "seed", "n_tokens", "exclude_bos", "n_eval_tokens"}
    assert not whole & web.keys()


def test_named_parts_can_be_overridden_and_swept_by_key():
    named = sources(NAMED, "data.parts.web.path=c/d", "data.weights={code: 1, web: 2}", "data.weights.web=3")
    assert (named["web"]["path"], [*named]) == ("c/d", ["code", "web"])


def test_settings_of_a_stream_are_not_added_to_the_parts_of_a_run():
    config = resolved(LIST)
    assert bring_up_to_date(config) == config


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ("[{data: stdlib}, {data: finewebb}]", r"data\.parts\[1\]: data=finewebb is not known: did you mean fineweb\?"),
        ("[{data: _text}]", r"data\.parts\[0\]: data=_text is not known"),
        ("[{data: mixture}]", r"data\.parts\[0\] cannot be data=mixture: a part must be one of disassembly, "),
        ("{a: {data: cached}}", r"data\.parts\.a cannot be data=cached"),
        ("[{data: text_files}]", r"data\.parts\[0\]\.paths has no value: type \{data: text_files, paths: \.\.\.\}\."),
        (
            "[{data: stdlib, seq_len: 5}]",
            r"data\.parts\[0\]\.seq_len belongs to the whole mixture: .* set data\.seq_len",
        ),
        ("[{data: hub, colunm: x}]", r"data\.parts\[0\] \(data=hub\) has no key colunm: did you mean column\?"),
        ("[{data: stdlib, _target_: os.system}]", r"\(data=stdlib\) has no key _target_"),
        ("[stdlib]", r"data\.parts\[0\]=stdlib must name its text, such as "),
        ("stdlib", r"data\.parts=stdlib must be a list such as "),
    ],
)
def test_a_part_that_cannot_be_gets_one_sentence(parts, sentence):
    with pytest.raises(InterpolationResolutionError) as raised:
        resolved(f"data.parts={parts}")
    assert re.search(sentence, explain(raised.value, "train", []) or "")


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1, 2], "must be a mapping of many, few to numbers, as parts is"),
        ({"many": 1, "fw": 2}, "must be a mapping of many, few to numbers"),
        ({"many": 1, "few": 0}, "must be a list of numbers above 0"),
        ({"many": 1, "few": float("inf")}, "must be a list of numbers above 0"),
        (0.5, "must be a list or a mapping"),
    ],
)
def test_weights_that_do_not_fit_get_one_sentence(weights, sentence):
    with pytest.raises(SettingError, match=sentence):
        small(weights)


def test_one_part_is_no_mixture():
    with pytest.raises(SettingError, match="must have two texts or more"):
        small(parts=[numbers])
    with pytest.raises(SettingError, match=r"must be a list of 2 numbers"):
        small([1], parts=[numbers, numbers])


# ---- the data


def test_batches_are_those_of_the_mixed_rows_and_continue(caplog):
    caplog.set_level("INFO")
    data = small({"many": 3, "few": 1})
    many, few = (f"{share} from data.parts.{name} (numbers)" for name, share in (("many", 0.75), ("few", 0.25)))
    assert caplog.messages[0] == f"mixture of tokens: {many}, {few}"
    whole = list(data.train_dataloader())
    seen = torch.cat(whole)[:, 0, 0].long().tolist()
    rows = data.text.rows("train", True).take(8).flatten().tolist()
    assert sorted(seen[:32]) == sorted(rows[:32])  # two blocks
    half = small({"many": 3, "few": 1})
    list(zip(range(4), half.train_dataloader(), strict=False))
    resumed = small({"many": 3, "few": 1})
    resumed.load_state_dict(half.state_dict())
    assert equal(list(resumed.train_dataloader()), whole[4:])
    with pytest.raises(UserError, match="the text"):
        small({"many": 1, "few": 1}).load_state_dict(half.state_dict())


def test_the_key_of_a_cache_holds_the_parts_and_their_shares():
    key = data_key(small({"many": 3, "few": 1}))
    assert key["data.shares"] == [3, 1]
    assert (key["data.parts.many.n_documents"], key["data.parts.few.n_documents"]) == (40, 12)
    assert key["data.first_rows"] != data_key(small())["data.first_rows"]
    json.dumps(key)


CODE, WEB = "{data: text_files, paths: [code.txt]}", "{data: hub, path: web, held_out_documents: 50}"
COLUMNS = "{data: hub, path: web, held_out_documents: 50, column: %s}"
STDLIB = "{data: stdlib, held_out_every: 5}"
# Kind, as in docs/data.md -> overrides, and the shares that follow from them.
MIXTURES: dict[str, tuple[list[str], list[int]]] = {
    "mixture of files and a stream": ([f"data.parts=[{CODE}, {WEB}]", "data.weights=[0.7,0.3]"], [7, 3]),
    "mixture of bundled texts": (
        [f"data.parts=[{STDLIB}, {{data: disassembly, mixed: false}}]", "data.weights=[3,1]"],
        [3, 1],
    ),
    "mixture in equal shares": ([f"data.parts=[{CODE}, {WEB}, {COLUMNS % 'title'}]"], [1, 1, 1]),
    "mixture of named parts": (
        [f"data.parts={{code: {CODE}, web: {WEB}}}", "data.weights={web: 2, code: 1}"],
        [1, 2],
    ),
    "mixture of columns": ([f"data.parts=[{COLUMNS % 'title'}, {COLUMNS % 'text'}]"], [1, 1]),
}


@pytest.mark.parametrize("kind", list(MIXTURES))
def test_every_kind_of_mixture_has_its_shares_of_training_and_held_out_rows(kind, texts, monkeypatch):
    monkeypatch.chdir(texts)
    few = bundled.module_names(Path(sysconfig.get_paths()["stdlib"]))[:60]
    monkeypatch.setattr(bundled, "module_names", lambda root: few)
    overrides, shares = MIXTURES[kind]
    cfg = compose("data=mixture", *SMALL, *overrides)
    text = build(cfg, "data", lm=build(cfg, "lm")).text
    order = torch.tensor(next_parts(shares, [0] * len(shares), n := 60))
    for rows, alone in ((text.first_rows(n), "first_rows"), (text.held_out(n), "held_out")):
        for i, (part, share) in enumerate(zip(text.parts, shares, strict=True)):
            own = getattr(part.text, alone)(n * share // sum(shares))
            assert torch.equal(rows[order[: len(rows)] == i], own[: (order[: len(rows)] == i).sum()]), part.key
        assert len(rows) > n // 4


def test_the_documentation_lists_these_mixtures():
    table = (CONF.parent / "docs" / "data.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (mixture [\w ]+) \|.*`test_mixture_data\.py` \|$", table, re.MULTILINE) == [*MIXTURES]


# ---- runs

RUN = [*SMALL, "data=mixture", "data.weights=[0.7,0.3]"]
LONG = ["n_tokens=12_800", "trainer.validate_every=50", "trainer.checkpoint_every=10"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder with a text of random access, and with a stream in the format of the hub."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "web").mkdir()
    rows = ({"title": f"{i}: page {i * i % 97}. " * 5, "text": f"Page {i} says {i * i}. " * 9} for i in range(300))
    (folder / "web" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "code.txt").write_text("".join(f"x_{i} = {i * 7} + f(x_{i // 2})\n" for i in range(1000)))
    return folder


@pytest.fixture
def parts(texts, monkeypatch) -> str:
    monkeypatch.chdir(texts)
    return f"data.parts=[{CODE}, {WEB}]"


@pytest.mark.process
def test_a_stopped_run_of_a_mixture_continues_to_the_same_bits_and_evaluates(parts, tmp_path):
    dials = [*RUN, *LONG, parts]
    whole = run(*dials, f"hydra.run.dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert "mixture of tokens: 0.7 from data.parts[0] (text_files), 0.3 from data.parts[1] (hub)" in whole.stderr
    assert "data.parts[1]: text: column text of" in whole.stderr
    assert_continues_to_the_bits_of(tmp_path / "whole", tmp_path / "cut", dials, signal.SIGTERM, 100)
    before = json.loads((tmp_path / "cut" / "metrics.json").read_text())
    assert run(f"run_dir={tmp_path / 'cut'}", module="evaluate").returncode == 0
    assert json.loads((tmp_path / "cut" / "metrics.json").read_text()) == before


@pytest.mark.process
def test_a_mixture_is_harvested_and_swept(parts, tmp_path):
    cache = [f"cache_dir={tmp_path / 'cache'}", "n_tokens=2048", "seq_len=32", "shard_tokens=1024"]
    done = run(*cache, "data=mixture", parts, "data.n_eval_tokens=256", module="harvest")
    assert done.returncode == 0, done.stderr
    sweep = ["hydra/launcher=shared_stream", f"hydra.sweep.dir={tmp_path / 'sweep'}", "sae=topk", "k=4,8"]
    done = run("-m", *RUN, parts, *sweep)
    assert done.returncode == 0, done.stderr
    assert "2 SAEs share one pass" in done.stderr
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 2
    assert_one_sentence(run("data=mixture"), "data.parts has no value: give data.parts=...")
