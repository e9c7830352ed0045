"""Names and settings are text: on the screen, in report.md and in report.csv."""

import json

import pandas as pd
import pytest
import yaml

from sae_lab.runtime.plain_text import for_code_span, for_csv, for_markdown, for_terminal
from sae_lab.runtime.screen import print_metrics
from sae_lab.sweeps.headline import headline, markdown, show_headline
from sae_lab.sweeps.status import all_jobs, job_statuses, show_statuses
from sae_lab.sweeps.table import collect_table, complete_jobs, write_csv

NASTY = [
    "[/a]",
    "[bold]x",
    "\x1b[31mred",
    "<script>alert(1)</script>",
    "![x](http://x)",
    "=cmd()",
    "@SUM(1)",
    "a|b",
    "`x`",
]


def test_control_characters_do_not_reach_the_terminal():
    assert for_terminal("a\x1b[2Jb\x07\r\n\tc\x9b") == "a�[2Jb��\n\tc�"


def test_markdown_renders_as_what_was_written():
    assert for_markdown("<b> & [l](u) a|b `c` *d*\ne_f") == r"&lt;b&gt; &amp; \[l\](u) a\|b \`c\` *d* e_f"
    assert for_code_span("a`b\nc") == "a'b c"


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-cmd", "@SUM(A1)"])
def test_a_formula_becomes_text_in_csv(text):
    assert for_csv(text) == f"'{text}"


@pytest.mark.parametrize("text", ["-1", "+1.5e-3", "abc", "", "k=8"])
def test_other_cells_stay(text):
    assert for_csv(text) == text


@pytest.fixture
def sweep(tmp_path):
    """Jobs whose data.paths and folders are anything but plain."""
    for i, nasty in enumerate(NASTY):
        folder = tmp_path / f"{i}-{nasty.replace('/', '_')}"
        (folder / ".hydra").mkdir(parents=True)
        config = {"k": 8, "n_latents": 64, "seed": i, "sae": {"_target_": "sae_lab.saes.topk.TopKSAE", "k": 8}}
        config |= {"n_tokens": 1024, "batch_size": 128, "data": {"paths": [nasty]}, "note": nasty}
        (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=False))
        (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump([f"+note={json.dumps(nasty)}"]))
        if i % 2 == 0:
            metrics = {"fvu": 0.1, "nmse": 0.1, "l0": 8.0, "n_latents": 64, "d_in": 8}
            (folder / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path


def test_a_report_of_nasty_names_shows_them_as_they_are(sweep, capsys):
    jobs = job_statuses(sweep, all_jobs(sweep))
    show_statuses(jobs)
    table = collect_table(sweep)
    cells = headline(table, complete_jobs(table))
    show_headline(cells, [sweep / "report.csv"])
    print_metrics({"fvu": 0.1}, sweep / "[/a]")
    said = capsys.readouterr().out
    assert "\x1b[31m" not in said
    assert "[/a]" in said
    text = markdown(cells, table, jobs, sweep, [])
    assert "<script>" not in text.replace("&lt;script", "")
    assert "![x](" not in text
    write_csv(table, sweep / "report.csv")
    written = pd.read_csv(sweep / "report.csv", dtype=str)
    assert not written.map(lambda cell: isinstance(cell, str) and cell.startswith(("=", "@"))).any(axis=None)
    assert written["note"].isin(["'=cmd()"]).any()
