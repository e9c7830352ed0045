"""The figures hold the numbers of their tables."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
import sketches
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from sae_lab import plots
from sae_lab.plots import run, style
from sae_lab.plots import sweep as sweeps


@pytest.fixture(scope="module", autouse=True)
def _as_a_user_gets_them():
    sketches.draw_sketches(False)
    yield
    sketches.draw_sketches()


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that were saved, in order; they are still written."""
    figures: list[Figure] = []
    save = Figure.savefig

    def spy(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


@pytest.fixture
def path(tmp_path):
    return tmp_path / "figures" / "figure.png"  # whose folder does not exist yet


def sweep() -> pd.DataFrame:
    """TopK at two k and two sizes with two seeds, BatchTopK at one seed: nmse = 1 / (k * n_latents) + 0.01 * seed."""
    rows = [
        {"line": line, "k": k, "n_latents": n, "seed": seed, "nmse": 1 / (k * n) + 0.01 * seed}
        for line, seeds in (("TopK", 2), ("BatchTopK", 1))
        for k in (16, 32)
        for n in (1024, 512)
        for seed in range(seeds)
    ]
    table = pd.DataFrame(rows)
    return table.assign(ce_degradation=2 * table["nmse"], l0=table["k"] + 0.5 * table["seed"], loss_recovered=0.9)


def points_of(axes) -> dict[str, tuple[list[float], list[float]]]:
    """{label: (x, y)} of the error-bar lines of a panel."""
    return {
        c.get_label(): tuple(np.asarray(v, float).tolist() for v in (c.lines[0].get_xdata(), c.lines[0].get_ydata()))
        for c in axes.containers
    }


def test_mean_over_seeds_is_mean_and_sample_std():
    table = pd.DataFrame({"line": ["b", "a", "a", "a"], "k": [8, 16, 8, 8], "nmse": [0.5, 0.1, 0.2, 0.4]})
    points = plots.mean_over_seeds(table, "k", ["nmse"], "line")
    assert points[["line", "k", "n"]].to_numpy().tolist() == [["b", 8, 1], ["a", 8, 2], ["a", 16, 1]]
    assert points["nmse"].tolist() == pytest.approx([0.5, 0.3, 0.1])
    assert points["nmse_std"].tolist() == pytest.approx([np.nan, 0.1 * 2**0.5, np.nan], nan_ok=True)


def test_mean_over_seeds_leaves_out_rows_without_x():
    table = pd.DataFrame({"line": ["a", "a"], "k": pd.Series([8, None], dtype="Int64"), "nmse": [0.5, 0.1]})
    assert plots.mean_over_seeds(table, "k", ["nmse"], "line")["nmse"].tolist() == [0.5]


def test_a_line_on_top_of_another_says_so(drawn, path):
    again = sweep().query("line == 'BatchTopK'").assign(line="BatchTopK, batch-wise")
    table = pd.concat([sweep(), again.assign(nmse=again["nmse"] * 1.0001)])
    plots.metrics_against(table, path, "n_latents", ["nmse"], "line", {"k": 16})
    assert list(points_of(drawn[0].axes[0])) == ["TopK", "BatchTopK", "BatchTopK, batch-wise (on top of BatchTopK)"]


def test_against_draws_means_on_a_log2_axis_with_the_sizes_as_ticks(drawn, path):
    assert plots.metrics_against(sweep(), path, "n_latents", ["nmse", "ce_degradation"], "line", {"k": 16}) == path
    nmse, ce = drawn[0].axes
    points = points_of(nmse)
    assert points["TopK"] == ([512, 1024], pytest.approx([1 / 8192 + 0.005, 1 / 16384 + 0.005]))
    assert points["BatchTopK"] == ([512, 1024], pytest.approx([1 / 8192, 1 / 16384]))
    assert points_of(ce)["BatchTopK"][1] == pytest.approx([2 / 8192, 2 / 16384])
    assert nmse.get_xscale() == "log"
    assert nmse.get_xticks().tolist() == [512, 1024]
    assert [label.get_text() for label in nmse.get_xticklabels()] == ["512", "1,024"]
    assert drawn[0].get_suptitle() == "k = 16, mean ± s.d. over 1–2 seeds"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["TopK", "BatchTopK"]


def test_a_metric_without_values_at_this_k_has_no_panel(drawn, path):
    table = sweep()
    table.loc[table["k"] == 16, "nmse"] = np.nan
    plots.metrics_against(table, path, "n_latents", ["nmse", "ce_degradation"], "line", {"k": 16})
    assert [axes.get_ylabel() for axes in drawn[0].axes] == [style.LABELS["ce_degradation"]]


def test_labels_of_crowded_sizes_are_left_out():
    assert sweeps.spaced([1024, 2048, 4096]) == [1024, 2048, 4096]
    assert sweeps.spaced([1024, 1536, 2048, 1_048_576]) == [1024, 1_048_576]


def test_a_label_wider_than_its_place_is_broken_after_commas():
    assert style.wrap("TopK, lr=0.001", 2) == "TopK, lr=0.001"
    assert style.wrap("expansion=2,k=4,sae=batch_topk", 1.5) == "expansion=2, k=4,\nsae=batch_topk"
    assert style.legend_lines(["a" * 10 + "," + "b" * 20, "c"], 2) == 3


def test_against_has_error_bars_of_one_std_only_where_there_are_seeds(drawn, path):
    plots.metrics_against(sweep(), path, "k", ["nmse"], "line", {"n_latents": 512})
    bars = {c.get_label(): c.lines[2] for c in drawn[0].axes[0].containers}
    (low, high) = bars["TopK"][0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(0.01 / 2**0.5)
    assert bars["BatchTopK"] == ()


def test_a_line_has_one_colour_in_every_figure_of_a_table(drawn, path):
    table = pd.concat([sweep(), sweep().query("k == 32").assign(line="Gated")])
    table = table[(table["line"] != "TopK") | (table["k"] == 16)]
    for k in (16, 32):
        plots.metrics_against(table, path, "n_latents", ["nmse"], "line", {"k": k})
    colours = [{c.get_label(): c.lines[0].get_color() for c in f.axes[0].containers} for f in drawn]
    assert colours[0].keys() == {"TopK", "BatchTopK"}
    assert colours[1].keys() == {"BatchTopK", "Gated"}
    assert colours[0]["BatchTopK"] == colours[1]["BatchTopK"]


def test_lines_past_the_palette_still_differ():
    styles = sweeps._line_styles([f"line {i}" for i in range(3 * len(style.PALETTE))])
    assert len({(s["color"], s["linestyle"]) for s in styles.values()}) == len(styles)


def test_frontier_averages_seeds_and_sizes_markers_by_dictionary(drawn, path):
    plots.frontier(sweep(), path, "loss_recovered", "line", "line")
    (axes,) = drawn[0].axes
    x = sorted(float(offset[0]) for c in axes.collections for offset in c.get_offsets())
    assert x == [16, 16, 16.25, 16.25, 32, 32, 32.25, 32.25]
    areas = {float(c.get_sizes()[0]) for c in axes.collections}
    assert len(areas) == 2
    labels = [text.get_text().strip() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["TopK", "BatchTopK", "Dictionary size (latents)", "512", "1,024"]


def test_l0_by_line_adds_up_seeds_and_marks_bos(drawn, path):
    rows = [("TopK", 8, 8, 1, 99), ("TopK", 8, 8, 1, 99), ("BatchTopK", 8, 6, 0, 50), ("BatchTopK", 8, 10, 2, 48)]
    rows += [("BatchTopK", 16, 16, 1, 99)]
    plots.l0_by_line(pd.DataFrame(rows, columns=["line", "k", "l0", "bos", "other"]), path)
    first, second = drawn[0].axes
    (stairs,) = first.patches
    assert stairs.get_data().values[8] == pytest.approx(100)  # % of the tokens
    assert [patch.get_data().values[6] for patch in second.patches] == pytest.approx([50, 0])
    assert [line.get_xdata().tolist() for line in second.lines] == [[10], [16]]  # mean L0 of BOS
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["k = 8", "mean at BOS positions", "k = 16"]


def test_by_job_puts_each_job_at_its_value(drawn, path):
    table = pd.DataFrame({"label": ["0: TopK", "1: Gated"], "nmse": [0.25, 0.5]})
    plots.by_job(table, path, ["nmse"], "label")
    (axes,) = drawn[0].axes
    assert axes.lines[0].get_xdata().tolist() == [0.25, 0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0: TopK", "1: Gated"]
    assert axes.yaxis_inverted()  # the first job on top


def test_l0_per_token_stacks_bos_apart_in_per_cent(drawn, path):
    table = pd.DataFrame({"l0": [1, 8, 9], "bos": [8, 0, 2], "other": [0, 60, 30]})
    plots.l0_per_token(table, path, k=8)
    (axes,) = drawn[0].axes
    shares = {}
    for bars in axes.containers:
        shares[bars.get_label()] = {b.get_x() + 0.5: b.get_height() for b in bars if b.get_height() > 0}
    assert shares == {"BOS": {1: 8, 9: 2}, "other tokens": {8: 60, 9: 30}}
    assert max(bar.get_y() + bar.get_height() for bar in axes.patches if bar.get_x() == 8.5) == 32  # one on the other
    assert [(line.get_xdata()[0], line.get_label()) for line in axes.lines] == [(7.76, "mean = 7.8"), (8, "k = 8")]


def test_l0_per_token_cuts_a_long_tail_and_says_so(drawn, path):
    table = pd.DataFrame({"l0": [32, 5000], "bos": [0, 0], "other": [99999, 1]})
    plots.l0_per_token(table, path)
    (axes,) = drawn[0].axes
    assert axes.get_xlim()[1] < 60
    assert "up to L0 = 5,000" in axes.get_title()


@pytest.mark.parametrize("l0", [[0], [1], [16], [3, 4000], [0, 1, 2]])
def test_l0_bins_cover_whole_numbers(l0):
    edges = run._l0_bins(np.array(l0, float), np.ones(len(l0)))
    assert edges[0] <= min(l0) < max(l0) + 1 <= edges[-1] + 0.5
    assert len(edges) <= 83
    assert set((edges + 0.5) % 1) == {0}


def test_latent_density_counts_the_dead_apart(drawn, path):
    density = [0, 0, 0.0101, 0.0102, 0.5]
    plots.latent_density(pd.DataFrame({"latent": range(5), "density": density}), path)
    (axes,) = drawn[0].axes
    assert axes.get_title() == "2 of 5 latents are dead (40.0 %)"
    bins = {round(bar.get_x(), 2): bar.get_height() for bar in axes.patches if bar.get_height() > 0}
    assert bins == {-2: 2, -0.5: 1}
    assert 10 ** axes.lines[0].get_xdata()[0] == pytest.approx(0.0102)  # the median of the living


def test_latent_density_of_a_dead_sae(drawn, path):
    plots.latent_density(pd.DataFrame({"latent": range(3), "density": 0.0}), path)
    assert drawn[0].axes[0].get_title() == "3 of 3 latents are dead (100.0 %)"


SPEED = "Tokens per second, mean so far"


def log_table() -> pd.DataFrame:
    """Three training rows, and a validation row that has a step but no tokens."""
    return pd.DataFrame(
        {
            "step": [10, 20, 30, 20],
            "tokens": [1000, 2000, 3000, None],
            "fvu": [0.9, 0.5, 0.4, None],
            "l0": [16, 16, 16, None],
            "loss/reconstruction": [10.0, 1.0, 0.1, None],
            "val/fvu": [None, None, None, 0.45],
        }
    )


def test_training_curves_overlay_validation_and_leave_out_empty_panels(drawn, path):
    plots.training_curves(log_table(), path)
    visible = [axes for axes in drawn[0].axes if axes.get_visible()]
    assert [axes.get_title() for axes in visible] == [run.PANELS[i][0] for i in range(3)]
    loss, fvu, l0 = visible
    assert [line.get_xydata().tolist() for line in fvu.lines] == [
        [[1000, 0.9], [2000, 0.5], [3000, 0.4]],
        [[2000, 0.45]],
    ]
    assert (loss.get_yscale(), fvu.get_yscale(), l0.get_ylim()[0]) == ("log", "linear", 0)
    assert [axes.get_xlabel() for axes in visible] == ["", "Training tokens", "Training tokens"]


def test_training_curves_of_a_resumed_run_go_forward(drawn, path):
    plots.training_curves(log_table().iloc[[2, 0, 1]], path)
    assert drawn[0].axes[1].lines[0].get_xdata().tolist() == [1000, 2000, 3000]


def test_training_curves_of_one_row_show_it(drawn, path):
    plots.training_curves(log_table().iloc[:1], path)
    fvu = drawn[0].axes[1]
    assert fvu.lines[0].get_marker() == "."
    assert fvu.get_ylim() == pytest.approx((0, 0.954))


def test_training_curves_start_at_0_and_have_panels_of_rate_speed_and_own_metrics(drawn, path):
    rate = [1e-5, 1e-3, 1e-4, None]
    table = log_table().assign(lr=rate, tokens_per_second=rate, **{"val/loss_recovered": 0.9, "val/worst": 2.0})
    plots.training_curves(table, path, "tiny   transformer.h.2")
    panels = {axes.get_title(): axes for axes in drawn[0].axes if axes.get_visible()}
    assert list(panels)[3:] == ["CE loss recovered (share)", "Learning rate", SPEED, "worst"]
    assert panels["Learning rate"].get_yscale() == "linear"
    assert {axes.get_xlim()[0] for axes in panels.values()} == {0}
    assert [text.get_text() for text in drawn[0].texts] == ["tiny   transformer.h.2"]


def test_activations_are_shares_of_the_active_entries(drawn, path):
    plots.activations(pd.DataFrame({"log2": [-0.125, 0.125, 0.375], "entries": [1, 2, 1]}), path)
    (axes,) = drawn[0].axes
    assert [bar.get_height() for bar in axes.patches] == [25, 50, 25]
    assert [bar.get_x() for bar in axes.patches] == pytest.approx([2**-0.25, 1, 2**0.25])
    plots.activations(pd.DataFrame({"log2": [], "entries": []}), path)


@pytest.mark.parametrize("columns", [["step"], ["step", "tokens"]])
def test_training_curves_of_an_empty_log(drawn, path, columns):
    plots.training_curves(log_table()[columns], path)
    assert drawn[0].axes[0].get_title() == "nothing was logged"


@pytest.mark.parametrize(
    ("name", "paper"),
    [("topk", "TopK"), ("batch_topk", "BatchTopK"), ("TopKSAE", "TopK"), ("jumprelu", "JumpReLU"), ("gated", "Gated")],
)
def test_display_name(name, paper):
    assert plots.display_name(name) == paper


def test_a_figure_is_200_dpi_and_leaves_no_state_behind(path):
    before = dict(matplotlib.rcParams)
    plots.latent_density(pd.DataFrame({"density": [0.1, 0.2]}), path)
    assert dict(matplotlib.rcParams) == before
    image = imread(path)
    assert abs(image.shape[1] - 200 * style.COLUMN) < 40


def test_the_palette_tells_lines_apart_without_colour():
    grey = sorted(np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722]) for colour in style.PALETTE[:3])
    assert min(np.diff(grey)) > 0.02
    assert len(set(sweeps.MARKERS)) == len(style.PALETTE)


def test_relative_norm_draws_each_class_in_its_place(drawn, path):
    table = pd.DataFrame({"relative_norm": [0.0, 0.1, 0.5, 0.5, 0.71, 1.0, 0.5], "density": [0.1] * 6 + [0.0]})
    table["class"] = ["base_only", "base_only", "shared", "shared", "between", "tuned_only", "shared"]
    plots.relative_norm(table, path)
    axes = drawn[0].axes[0]
    labels = axes.get_legend_handles_labels()[1]
    bars = [{round(p.get_x(), 2): p.get_height() for p in c if p.get_height()} for c in axes.containers]
    heights = dict(zip(labels, bars, strict=True))
    assert heights["base only: 2"] == {0.0: 1, 0.1: 1}
    assert heights["shared: 2"] == {0.5: 2}
    assert heights["fine-tuned only: 1"] == {0.98: 1}
    assert heights["between: 1"] == {0.7: 1}
    assert axes.get_title() == "1 of 7 latents never fire and are left out"
