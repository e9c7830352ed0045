"""A sweep's folders become a table with the right rows, columns and numbers, and the figures that the sweep has."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from shell import run

from sae_lab import plots
from sae_lab.runtime.errors import UserError
from sae_lab.sweeps.figures import add_batch_wise_rows, draw_sweep, line_names
from sae_lab.sweeps.headline import _mean_and_spread, _rounded, headline, holds_numbers, markdown, show_headline
from sae_lab.sweeps.status import all_jobs, job_statuses
from sae_lab.sweeps.table import collect_table, complete_jobs, parse_overrides, setting_columns

D_IN = 64
CLASSES = {"topk": "TopKSAE", "batch_topk": "BatchTopKSAE"}


def write_job(folder: Path, *overrides: str, done: bool = True, config: dict | None = None, **metrics: float) -> Path:
    """A run folder such as `train` leaves it; nmse = 1 / (k * expansion) + 0.01 * seed unless it is given."""
    dials = {"sae": "batch_topk", "k": 16, "expansion": 8, "seed": 0}
    given = dict(o.split("=", 1) for o in overrides if "=" in o)
    dials |= {key: given[key] if key == "sae" else int(given[key]) for key in dials if key in given}
    k, expansion, seed = (int(dials[key]) for key in ("k", "expansion", "seed"))
    sae = {"_target_": f"sae_lab.saes.{dials['sae']}.{CLASSES[str(dials['sae'])]}", "k": k}
    whole = {"n_tokens": 1000, "batch_size": 1000} | {
        "k": k,
        "expansion": expansion,
        "n_latents": None,
        "seed": seed,
        "sae": sae,
        "optimizer": {"lr": 0.001},
    }
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(whole | (config or {})))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    if done:
        nmse = 1 / (k * expansion) + 0.01 * seed
        numbers = {"nmse": nmse, "ce_degradation": 2 * nmse, "loss_recovered": 1 - nmse, "l0": float(k)}
        numbers |= {"n_latents": expansion * D_IN, "d_in": D_IN} | metrics
        (folder / "metrics.json").write_text(json.dumps(numbers | {"train_mode": {"nmse": nmse / 2, "l0": k + 0.5}}))
    return folder


def complete_of(folder: Path) -> pd.DataFrame:
    return complete_jobs(collect_table(folder))


def cells_of(table: pd.DataFrame) -> pd.DataFrame:
    return headline(table, complete_jobs(table))


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Two SAEs, k = 8 and 16, 256 and 512 latents, two seeds; job 10 is not complete, job 11 is of another size."""
    jobs = [(sae, k, expansion) for sae in CLASSES for k in (8, 16) for expansion in (4, 8)]
    for i, (sae, k, expansion) in enumerate(jobs):
        write_job(tmp_path / f"{i}", f"sae={sae}", f"k={k}", f"expansion={expansion}", "seed=0")
    write_job(tmp_path / "9", "sae=topk", "k=8", "expansion=4", "seed=1")
    write_job(tmp_path / "10", "sae=topk", "k=8", "expansion=8", "seed=1", done=False)
    write_job(tmp_path / "11", "k=8", "expansion=16", "optimizer.lr=1e-4", config={"optimizer": {"lr": 1e-4}})
    return tmp_path


def test_collect_has_a_row_a_job_in_counting_order(sweep):
    table = collect_table(sweep)
    assert table["job"].tolist() == ["0", "1", "2", "3", "4", "5", "6", "7", "9", "10", "11"]
    assert table["status"].tolist() == ["complete"] * 9 + ["interrupted", "complete"]


def test_collect_columns_are_overrides_resolved_dials_status_metrics(sweep):
    table = collect_table(sweep)
    settings = ["sae", "k", "expansion", "seed", "optimizer.lr", "n_latents"]
    metrics = ["nmse", "ce_degradation", "loss_recovered", "l0", "d_in", "train_mode/nmse", "train_mode/l0"]
    assert list(table) == ["job", *settings, "status", *metrics]
    assert setting_columns(table) == settings


def test_collect_values(sweep):
    table = collect_table(sweep).set_index("job")
    row = table.loc["9"]
    assert row[["sae", "k", "expansion", "n_latents", "seed"]].tolist() == ["topk", 8, 4, 256, 1]
    assert row["nmse"] == pytest.approx(1 / 32 + 0.01)
    assert row["train_mode/nmse"] == pytest.approx((1 / 32 + 0.01) / 2)
    assert table["optimizer.lr"].tolist() == [0.001] * 10 + [0.0001]  # from the config where it was not overridden
    assert table.loc["11", "sae"] == "BatchTopKSAE"  # nor was the SAE: its class


def test_collect_keeps_whole_numbers_whole_beside_a_blank(sweep):
    table = collect_table(sweep)
    assert pd.isna(table.set_index("job").loc["10", "n_latents"])
    assert str(table["n_latents"].dtype) == "Int64"
    table.to_csv(sweep / "t.csv", index=False)
    assert ",512,complete," in (sweep / "t.csv").read_text()


def test_collect_of_one_run_folder(tmp_path):
    run = write_job(tmp_path / "outputs" / "12-00-00", "k=8")
    table = collect_table(run)
    assert table[["job", "k", "n_latents", "status"]].to_numpy().tolist() == [["12-00-00", 8, 512, "complete"]]


def test_a_run_repeated_is_no_second_seed(tmp_path):
    """vanilla has no k: a sweep over k trains it twice, to the same bits."""
    vanilla = {"sae": {"_target_": "sae_lab.saes.vanilla.VanillaSAE", "l1_coefficient": 1.0}}
    for seed in (0, 1):
        for k in (8, 16):
            write_job(tmp_path / f"v{k}-{seed}", f"k={k}", f"seed={seed}", config=vanilla, nmse=0.2 + 0.1 * seed)
            write_job(tmp_path / f"b{k}-{seed}", f"k={k}", f"seed={seed}")
    cells = cells_of(collect_table(tmp_path))
    assert cells[["k", "seeds"]].to_numpy().tolist() == [["8", "2"], ["16", "2"], ["–", "2"]]
    assert cells["nmse"].iloc[-1] == "0.2500 ± 0.0707"


def test_collect_finds_jobs_in_nested_folders_and_none_inside_a_job(tmp_path):
    write_job(tmp_path / "first" / "k=8,sae=topk", "k=8", "sae=topk")
    write_job(tmp_path / "first" / "k=8,sae=topk" / "copy", "k=8")
    write_job(tmp_path / "second" / "0", "k=16")
    assert collect_table(tmp_path)["job"].tolist() == ["first/k=8,sae=topk", "second/0"]


def test_a_folder_that_holds_no_run_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a folder: give sweep_dir="):
        all_jobs(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no run .*: give sweep_dir="):
        all_jobs(tmp_path)


def test_a_metrics_file_that_is_cut_off_is_named(tmp_path):
    run = write_job(tmp_path / "0", "k=8")
    (run / "metrics.json").write_text('{"nmse": 0.1')
    assert collect_table(tmp_path)["status"].tolist() == ["unreadable"]
    assert "metrics.json is not JSON" in collect_table(tmp_path)["reason"].item()


def test_parse_overrides_by_hydras_grammar():
    overrides = [
        "k=8",
        "+optimizer.eps=1e-8",
        "++name='a b'",
        "sae@sae.inner=topk",
        "data.paths=[a,b]",
        "~logger",
        "x=null",
    ]
    assert parse_overrides(overrides) == {
        "k": 8,
        "optimizer.eps": 1e-8,
        "name": "a b",
        "sae@sae.inner": "topk",
        "data.paths": ["a", "b"],
        "~logger": True,
        "x": None,
    }


def test_settings_of_every_kind_reach_the_table(tmp_path):
    config = {"data": {"paths": ["a", "b"]}, "optimizer": {"lr": "${base_lr}"}, "base_lr": 0.5}
    overrides = ("data.paths=[a,b]", "optimizer.lr=${base_lr}", "sae@sae.inner=topk", "~logger", "n_latents=512")
    write_job(tmp_path / "0", *overrides, config=config)
    write_job(tmp_path / "1", "k=8", config={"data": {"paths": ["c"]}})
    table = collect_table(tmp_path)
    assert table["data.paths"].tolist() == ["[a,b]", "[c]"]
    assert table["optimizer.lr"].tolist() == [0.5, 0.001]
    assert table["sae@sae.inner"].tolist()[0] == "topk"
    assert table["~logger"].tolist()[0] is True
    assert table["n_latents"].tolist() == [512, 512]


def test_expansion_follows_n_latents_where_that_was_given(tmp_path):
    write_job(tmp_path / "0", "n_latents=1024", n_latents=1024)
    write_job(tmp_path / "1", "n_latents=96", n_latents=96)
    assert collect_table(tmp_path)["expansion"].tolist() == [16, 1.5]


def test_expansion_that_was_given_is_kept(tmp_path):
    write_job(tmp_path / "0", "expansion=8", n_latents=512, d_in=32)
    assert collect_table(tmp_path)["expansion"].tolist() == [8]


def test_a_choice_that_was_not_overridden_is_named_by_hydra_yaml(tmp_path):
    run = write_job(tmp_path / "0", "k=8")
    choices = {"hydra": {"runtime": {"choices": {"sae": "batch_topk", "experiment": None}}, "x": "${hydra:nowhere}"}}
    (run / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(choices))
    assert collect_table(tmp_path)["sae"].tolist() == ["batch_topk"]


def test_an_sae_without_k_has_no_k(tmp_path):
    vanilla = {"_target_": "sae_lab.saes.vanilla.VanillaSAE", "l1_coefficient": 0.002}
    routed = {"_target_": "sae_lab.saes.route.RoutedSAE", "inner": {"_target_": "sae_lab.saes.topk.TopKSAE", "k": 8}}
    write_job(tmp_path / "0", "k=8", config={"sae": vanilla})
    write_job(tmp_path / "1", "k=8", config={"sae": routed})
    write_job(tmp_path / "2", "k=8")
    assert collect_table(tmp_path)["k"].isna().tolist() == [True, False, False]


def test_a_line_is_an_architecture_and_whatever_else_varies_among_twins(tmp_path):
    for i, (k, lr, seed) in enumerate([(8, 0.001, 0), (8, 0.001, 1), (8, 0.01, 0), (16, 0.01, 0)]):
        write_job(tmp_path / f"{i}", f"k={k}", f"optimizer.lr={lr}", f"seed={seed}", config={"optimizer": {"lr": lr}})
    table = collect_table(tmp_path)
    low, high = "BatchTopK, lr=0.001", "BatchTopK, lr=0.01"
    assert line_names(table).tolist() == [low, low, high, high]
    # Without the two jobs that differ in the learning rate alone, it is no part of the name.
    assert line_names(table.iloc[[0, 1, 3]]).tolist() == ["BatchTopK"] * 3


def test_seeds_are_averaged_and_incomplete_jobs_are_not(sweep):
    table = collect_table(sweep)
    done = table[table["status"] == "complete"]
    points = plots.mean_over_seeds(done.assign(line=line_names(done)), "n_latents", ["nmse"], "line")
    first = points[points["line"] == "TopK"].iloc[0]
    assert (first["n_latents"], first["n"]) == (256, 3)  # k = 8 with seeds 0 and 1, and k = 16
    of_k_8 = plots.mean_over_seeds(done[done["k"] == 8].assign(line=line_names(done)), "n_latents", ["nmse"], "line")
    row = of_k_8[of_k_8["line"] == "TopK"].iloc[0]
    assert row["nmse"] == pytest.approx(1 / 32 + 0.005)
    assert row["nmse_std"] == pytest.approx(0.01 / 2**0.5)


def test_draw_has_a_figure_for_every_slice_of_the_sweep(sweep):
    figures = draw_sweep(complete_of(sweep), sweep)
    names = [
        "nmse_ce_vs_n_latents_k8",
        "nmse_ce_vs_n_latents_k16",
        "nmse_ce_vs_k_n256",
        "nmse_ce_vs_k_n512",
        "frontier",
    ]
    assert [f.relative_to(sweep).as_posix() for f in figures] == [f"figures/{name}.png" for name in names]
    assert all(f.is_file() for f in figures)


def test_the_comparisons_draw_both_rules(sweep, monkeypatch):
    lines = []
    monkeypatch.setattr(plots, "metrics_against", lambda table, path, *_: lines.append(set(table["line"])) or path)
    draw_sweep(complete_of(sweep), sweep)
    assert all({"TopK", "TopK, batch-wise", "BatchTopK", "BatchTopK, batch-wise"} <= names for names in lines)


def test_draw_counts_complete_jobs_only(tmp_path):
    for i, k in enumerate((8, 16)):
        write_job(tmp_path / f"{i}", f"k={k}", done=k == 8)
    assert draw_sweep(complete_of(tmp_path), tmp_path) == []
    write_job(tmp_path / "2", "k=16", "expansion=16")
    write_job(tmp_path / "3", "k=32", done=False, config={"n_latents": 512})
    assert [f.name for f in draw_sweep(complete_of(tmp_path), tmp_path)] == ["nmse_ce_by_job.png"]


def test_draw_falls_back_to_a_point_a_job(tmp_path):
    write_job(tmp_path / "0", "k=8", "expansion=4")
    write_job(tmp_path / "1", "k=16", "expansion=8")
    assert [f.name for f in draw_sweep(complete_of(tmp_path), tmp_path)] == ["nmse_ce_by_job.png"]


def test_draw_without_cross_entropies(tmp_path):
    for i, k in enumerate((8, 16, 32)):
        metrics = write_job(tmp_path / f"{i}", f"k={k}") / "metrics.json"
        numbers = json.loads(metrics.read_text())
        del numbers["ce_degradation"], numbers["loss_recovered"]
        metrics.write_text(json.dumps(numbers))
    assert [f.name for f in draw_sweep(complete_of(tmp_path), tmp_path)] == [
        "nmse_ce_vs_k_n512.png",
        "frontier.png",
    ]


def test_draw_of_a_sweep_with_an_sae_that_has_no_k(tmp_path):
    for i, k in enumerate((8, 16)):
        write_job(tmp_path / f"{i}", f"k={k}")
    vanilla = {"_target_": "sae_lab.saes.vanilla.VanillaSAE", "l1_coefficient": 0.002}
    write_job(tmp_path / "2", config={"sae": vanilla}, l0=200.0)
    assert [f.name for f in draw_sweep(complete_of(tmp_path), tmp_path)] == [
        "nmse_ce_vs_k_n512.png",
        "frontier.png",
    ]


def test_draw_of_one_run_takes_its_own_tables(tmp_path):
    run = write_job(tmp_path / "run", "k=8")
    (run / "metrics.csv").write_text("step,tokens,fvu\n1,100,0.5\n2,200,0.4\n")
    (run / "figures").mkdir()
    (run / "figures" / "latent_density.csv").write_text("latent,density\n0,0.1\n1,0.0\n")
    (run / "figures" / "l0_per_token.csv").write_text("l0,bos,other\n0,1,0\n8,0,9\n")
    (run / "figures" / "l0_per_token.png").write_bytes(b"the run's own")
    figures = draw_sweep(complete_of(run), run)
    assert [f.name for f in figures] == ["l0_per_token.png", "latent_density.png", "training.png"]
    assert figures[0].read_bytes() == b"the run's own"


def test_headline_is_sorted_rounded_and_without_what_does_not_vary(sweep):
    table = collect_table(sweep)
    cells = cells_of(table[~table["job"].isin(["9", "11"])])
    assert list(cells) == ["sae", "k", "n_latents", "seed", "nmse", "l0", "ce_degradation", "loss_recovered", "job"]
    assert cells["job"].tolist() == ["4", "5", "6", "7", "0", "1", "2", "3"]
    assert cells.iloc[5].tolist() == ["topk", "8", "512", "0", "0.0156", "8.0", "0.0312", "0.9844", "1"]


def test_headline_of_several_seeds_has_means_and_standard_deviations(sweep):
    table = collect_table(sweep)
    cells = cells_of(table[table["job"] != "11"])
    assert list(cells) == ["sae", "k", "n_latents", "seeds", "nmse", "l0", "ce_degradation", "loss_recovered"]
    assert cells.iloc[4].tolist() == (
        ["topk", "8", "256", "2", "0.0363 ± 0.0071", "8.0 ± 0.0", "0.0725 ± 0.0141", "0.9637 ± 0.0071"]
    )
    assert cells.iloc[5].tolist() == ["topk", "8", "512", "1", "0.0156", "8.0", "0.0312", "0.9844"]


def test_the_batch_wise_rule_is_a_line_of_its_own_where_it_scores_otherwise(tmp_path):
    write_job(tmp_path / "0", "k=8", nmse=0.25)
    write_job(tmp_path / "1", "k=16", nmse=1 / 256)  # half of 1 / 128: as the batch-wise rule
    done = collect_table(tmp_path).assign(line="BatchTopK")
    both = add_batch_wise_rows(done, ["nmse", "ce_degradation"])
    assert both["line"].tolist() == ["BatchTopK", "BatchTopK", "BatchTopK, batch-wise"]
    assert both["k"].tolist() == [8, 16, 8]
    assert both["nmse"].tolist() == [0.25, 1 / 256, 1 / 128]


def test_l0_is_drawn_for_the_largest_dictionary_at_every_k(tmp_path, monkeypatch):
    for i, (k, expansion) in enumerate([(8, 4), (8, 8), (16, 8)]):
        run = write_job(tmp_path / f"{i}", f"k={k}", f"expansion={expansion}")
        (run / "figures").mkdir()
        (run / "figures" / "l0_per_token.csv").write_text(f"l0,bos,other\n{k},{i},100\n20,0,5\n")
    run = write_job(tmp_path / "3", "sae=topk", "k=8")
    (run / "figures").mkdir()
    (run / "figures" / "l0_per_token.csv").write_text("l0,bos,other\n8,3,100\n")
    drawn = []
    monkeypatch.setattr(plots, "l0_by_line", lambda table, path, facts: drawn.append((table, facts)) or path)
    draw_sweep(complete_of(tmp_path), tmp_path)
    table, facts = drawn[0]
    rows = [[8, 8, 1, 100], [8, 20, 0, 5], [16, 16, 2, 100], [16, 20, 0, 5]]
    assert table[["k", "l0", "bos", "other"]].to_numpy().tolist() == rows
    assert facts == "1,000 tokens   seed 0   not shown: TopK, with k on every token"


def test_a_setting_that_was_swept_has_a_figure_of_its_own(tmp_path, monkeypatch):
    for i, (size, sae) in enumerate([(256, "topk"), (512, "topk"), (256, "batch_topk"), (512, "batch_topk")]):
        write_job(tmp_path / f"{i}", f"sae={sae}", f"batch_size={size}", config={"batch_size": size}, nmse=1 / size)
    drawn = {}
    draw = plots.metrics_against

    def spy(table, path, x, y, lines, fixed, facts):
        drawn[path.name] = x, sorted(set(table[lines])), dict(fixed)
        return draw(table, path, x, y, lines, fixed, facts)

    monkeypatch.setattr(plots, "metrics_against", spy)
    draw_sweep(complete_of(tmp_path), tmp_path)
    expected = ("batch_size", ["BatchTopK", "TopK"], {"k": 16.0, "n_latents": 512.0})
    assert drawn == {"nmse_ce_vs_batch_size_k16_n512.png": expected}
    assert (tmp_path / "figures" / "nmse_ce_vs_batch_size_k16_n512.png").is_file()


def test_saes_under_the_other_rule_have_a_figure(tmp_path, monkeypatch):
    for i, (sae, expansion) in enumerate([("topk", 4), ("topk", 8), ("batch_topk", 4), ("batch_topk", 8)]):
        run = write_job(tmp_path / f"{i}", f"sae={sae}", f"expansion={expansion}")
        if sae == "topk":
            numbers = json.loads((run / "metrics.json").read_text()) | {"nmse": 0.5}
            (run / "metrics_batch_topk.json").write_text(json.dumps(numbers))
    tables = {}
    monkeypatch.setattr(plots, "metrics_against", lambda t, path, *_: tables.update({path.name: t}) or path)
    draw_sweep(complete_of(tmp_path), tmp_path)
    cross = tables["cross_use_vs_n_latents_k16.png"]
    assert cross["line"].tolist() == ["TopK", "TopK", "TopK under BatchTopK", "TopK under BatchTopK"]
    assert cross["nmse"].tolist() == [1 / 64, 1 / 128, 0.5, 0.5]


def test_a_metric_of_ones_own_is_in_the_table_and_has_a_figure(tmp_path):
    for i, k in enumerate((8, 16)):
        write_job(tmp_path / f"{i}", f"k={k}", worst=1 / k, own_metrics=["worst"])
    assert "nmse_ce_vs_k_n512.png" in (names := [f.name for f in draw_sweep(complete_of(tmp_path), tmp_path)])
    assert "worst_vs_k_n512.png" in names
    table = collect_table(tmp_path)
    assert headline(table, complete_jobs(table), ["worst"])["worst"].tolist() == ["0.1250", "0.0625"]


def test_headline_leaves_out_folders_that_repeat_the_settings(tmp_path):
    write_job(tmp_path / "k=8,sae=topk", "k=8", "sae=topk")
    write_job(tmp_path / "k=16,sae=topk", "k=16", "sae=topk")
    assert "job" not in cells_of(collect_table(tmp_path))
    assert "job" in cells_of(collect_table(tmp_path / "k=8,sae=topk").assign(job="0"))


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.1235"), (0.00001234, "1.2e-05"), (0.0, "0.0000"), (-0.5, "-0.5000"), (None, "–")]
)
def test_rounded(value, text):
    assert _rounded(value, ".4f") == text


def markdown_of(folder: Path, *figures: Path) -> str:
    jobs = job_statuses(folder, all_jobs(folder))
    table = collect_table(folder)
    return markdown(cells_of(table), table, jobs, folder, list(figures))


def test_markdown_embeds_the_figures_and_names_incomplete_of(sweep):
    write_job(sweep / "12", "k=8", "expansion=16", "name='a|b'", config={"name": "a|b"})
    (sweep / "13").mkdir()
    (sweep / "13" / "failed.txt").write_text("k=0: raise k.\n")
    text = markdown_of(sweep, sweep / "figures" / "frontier.png")
    lines = text.splitlines()
    assert lines[0] == f"# {sweep.name}"
    assert "13 jobs: 11 complete, 1 interrupted, 1 failed." in lines
    assert {"- 10: interrupted step 0/1", "- 13: failed k=0: raise k."} < set(lines)
    assert "![frontier](figures/frontier.png)" in lines
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 10  # two seeds are one row
    assert "a\\|b" in text


def test_markdown_says_what_all_jobs_share(tmp_path):
    for i, k in enumerate((8, 16)):
        write_job(tmp_path / f"{i}", f"k={k}", "n_tokens=1000000", config={"n_tokens": 1000000})
    text = markdown_of(tmp_path)
    assert "The same for every job: `n_tokens=1000000`, `seed=0`." in text
    assert "2 jobs: 2 complete." in text


def test_show_never_cuts_a_number(sweep, capsys):
    show_headline(cells_of(collect_table(sweep)), [sweep / "report.csv"])
    said = capsys.readouterr().out
    assert "0.0363 ± 0.0071" in said
    assert "…" not in said
    assert f"{sweep}/report.csv" in said.replace("\n", "")


@pytest.mark.process
def test_the_command_writes_the_report_and_nothing_else(sweep, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("cwd")
    done = run(f"sweep_dir={sweep}", module="report", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert list(elsewhere.iterdir()) == []
    written = {p.name for p in sweep.iterdir() if not p.name.isdigit()}
    assert written == {"report.csv", "report.md", "figures"}
    assert len(pd.read_csv(sweep / "report.csv")) == 11
    assert "report.md" in done.stdout
    # A second report reads the same jobs, and is the same.
    before = (sweep / "report.md").read_bytes()
    assert run(f"sweep_dir={sweep}", module="report", cwd=elsewhere).returncode == 0
    assert (sweep / "report.md").read_bytes() == before


@pytest.mark.process
def test_the_command_tells_a_missing_folder_in_one_sentence(tmp_path):
    done = run("sweep_dir=nowhere", module="report", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("report: sweep_dir=nowhere is not a folder")
    assert len(done.stderr.splitlines()) == 1


def test_a_spread_has_the_digits_of_its_mean():
    assert _mean_and_spread(pd.Series([0.3175, 0.31751]), ".4f") == "0.3175 ± 0.0000"
    assert _mean_and_spread(pd.Series([1e-5, 3e-5]), ".4f") == "2.0e-05 ± 1.4e-05"


def test_columns_of_numbers_are_told_from_names():
    cells = pd.DataFrame({"k": ["8", "–"], "fvu": ["0.1 ± 0.0", "0.2"], "job": ["2024-01-01", "3"]})
    assert [holds_numbers(cells[c]) for c in cells] == [True, True, False]
