"""Figures hold the data they were given, in the arms' own colours, and claim no interval where there is none."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from PIL import Image

from dit_lens import plots
from dit_lens.analysis.clusters import upsample
from dit_lens.errors import OpError
from dit_lens.plots.overlays import trace_outline
from dit_lens.plots.theme import ARMS, INK, MASSIVE, label_width, place_labels
from dit_lens.plots.transfer import TRANSFER_ARMS

ARMS_OF_STUDIES = ("top", "bottom", "random", "energy-matched")


def named(figure: go.Figure, name: str) -> list:
    return [trace for trace in figure.data if trace.name == name]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# Theme.


def test_importing_the_library_does_not_import_plotly():
    code = "import dit_lens, sys; assert 'plotly' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_text_reads_on_light_and_dark_and_lines_show_on_both():
    for page in ("#ffffff", "#0d1117"):
        assert contrast(INK, page) > 4
        assert all(contrast(look.colour, page) > 2 for look in ARMS.values())


def test_every_arm_looks_different_and_keeps_its_look():
    assert len({(look.colour, look.symbol) for look in ARMS.values()}) == len(ARMS)
    few, many = plots.looks(["top", "mine"]), plots.looks(["mine", "all", "random", "top", "other"])
    assert list(many) == ["top", "random", "all", "mine", "other"]
    assert few["top"] == many["top"] == ARMS["top"]
    assert many["mine"].colour != many["other"].colour
    assert {many["mine"].colour, many["other"].colour}.isdisjoint(look.colour for look in ARMS.values())


def test_labels_never_cover_one_another():
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.uniform(0, 120, size=(24, 2))]
    widths = [label_width(str(int(c))) for c in rng.integers(0, 3072, 24)]
    found = place_labels(points, widths, stems=True)
    boxes = [(x + o[0], y + o[1], w) for (x, y), w, o in zip(points, widths, found, strict=True) if o is not None]
    assert 5 < len(boxes) < 24
    for i, (x, y, w) in enumerate(boxes):
        assert all(abs(x - u) >= (w + v) / 2 or abs(y - t) >= 13 for u, t, v in boxes[:i])


# Channels.


@pytest.fixture
def scores():
    values = np.linspace(0.1, 0.3, 128)
    values[[3, 17, 90]] = 12, 9, 5
    return values


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, list])
def test_spectrum_marks_massive_channels(scores, make):
    figure = plots.channel_spectrum(make(scores), (17, 3, 90), site="blocks.3.img")
    every, massive = figure.data
    np.testing.assert_allclose(every.y, scores)
    assert massive.x.tolist() == [3, 17, 90]
    assert massive.marker.color == MASSIVE
    assert massive.error_y.arrayminus.tolist() == massive.y.tolist() == [12, 9, 5]
    assert {label.text for label in figure.layout.annotations} == {"3", "17", "90"}
    assert "blocks.3.img" in figure.layout.title.text
    assert f"{12 / np.median(scores):.3g} times the median" in figure.layout.title.subtitle.text


def test_spectrum_by_rank_falls(scores):
    every, massive = plots.channel_spectrum(scores, (3, 17, 90), by_rank=True).data
    assert every.x.tolist() == list(range(1, 129))
    assert (np.diff(every.y) <= 0).all()
    assert massive.x.tolist() == [1, 2, 3]
    assert every.customdata[:3, 0].tolist() == [3, 17, 90]


def test_spectrum_without_massive_channels_marks_nothing(scores):
    figure = plots.channel_spectrum(scores)
    assert len(figure.data) == 1
    assert not figure.layout.annotations


def test_spectrum_labels_few_of_many_massive_channels(scores):
    assert len(plots.channel_spectrum(scores, range(128)).layout.annotations) <= 24


@pytest.mark.parametrize("draw", [plots.channel_spectrum, plots.channel_histogram])
def test_wrong_scores_are_refused(draw):
    with pytest.raises(OpError, match=r"one number per channel, \[d\], and got \[2, 3\]"):
        draw(np.ones((2, 3)))
    with pytest.raises(OpError, match=r"massive channels \[7\] are not among the 4"):
        draw(np.ones(4), [7])
    for odd in (np.inf, np.nan):
        with pytest.raises(OpError, match="Scores must be finite"):
            draw(np.array([1.0, odd]))
        with pytest.raises(OpError, match="Scores must be finite"):
            plots.block_channel_map({"blocks.0.img": [1.0, odd]})


def test_histogram_counts_every_positive_channel(scores):
    scores[5] = 0
    bars, rug = plots.channel_histogram(scores, (3, 17, 5)).data
    assert bars.y.sum() == 127
    low, high = bars.customdata[:, 0], bars.customdata[:, 1]
    assert low.min() == pytest.approx(scores[scores > 0].min())
    assert high.max() == pytest.approx(12)
    np.testing.assert_allclose(10**rug.x, [12, 9])
    assert rug.customdata[:, 0].tolist() == [3, 17]
    assert "1 channels at 0 are not drawn" in plots.channel_histogram(scores).layout.title.subtitle.text


@pytest.mark.parametrize("values", [np.zeros(8), np.ones(8), np.array([3.0])])
def test_degenerate_scores_still_give_figures(values):
    for figure in (
        plots.channel_spectrum(values, [0]),
        plots.channel_spectrum(values, [0], by_rank=True),
        plots.channel_histogram(values, [0]),
        plots.block_channel_map({"blocks.0.img": values}, {"blocks.0.img": [0]}),
    ):
        assert figure.to_json()


def test_map_has_logarithms_by_site_and_channel():
    scores = {"blocks.0.img": torch.tensor([1.0, 10.0, 0.0]), "blocks.1.img": np.array([100.0, 1.0])}
    figure = plots.block_channel_map(scores, {"blocks.0.img": (1,), "blocks.1.img": (0,)})
    heat, dots = figure.data
    np.testing.assert_allclose(heat.z, [[0, 1, 0], [2, 0, np.nan]])
    np.testing.assert_allclose(heat.customdata, [[1, 10, 0], [100, 1, np.nan]])
    assert list(heat.y) == list(scores)
    assert list(zip(dots.y, dots.x.tolist(), strict=True)) == [("blocks.0.img", 1), ("blocks.1.img", 0)]
    assert figure.layout.yaxis.ticktext == ("0", "1")
    assert figure.layout.yaxis.range == (1.5, -0.5)


def test_map_names_the_channels_that_recur():
    scores = {f"blocks.{i}.img": np.arange(1.0, 65) for i in range(4)}
    massive = {f"blocks.{i}.img": [3, 4, 5, 40, 50 + i] for i in range(4)}
    figure = plots.block_channel_map(scores, massive)
    assert [label.text for label in figure.layout.annotations] == ["3–5", "40"]
    assert not plots.block_channel_map(scores).layout.annotations


def test_map_takes_a_channel_set():
    from dit_lens.analysis.channels import top_channels

    scores = {"blocks.0.img": torch.tensor([1.0, 5.0, 2.0])}
    figure = plots.block_channel_map(scores, top_channels(scores, scores, k=1))
    assert figure.data[1].x.tolist() == [1]


# Images.


@pytest.fixture
def image():
    return Image.new("RGB", (8, 6), "navy")


def test_outline_is_the_border_of_the_mask():
    mask = np.random.default_rng(0).random((7, 9)) > 0.5
    x, y = trace_outline(mask)
    ends = [(x[i], y[i], x[i + 1], y[i + 1]) for i in range(0, len(x), 3)]
    length = sum(abs(x1 - x0) + abs(y1 - y0) for x0, y0, x1, y1 in ends)
    padded = np.pad(mask, 1).astype(int)
    assert length == np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()
    assert all((x0 == x1) != (y0 == y1) for x0, y0, x1, y1 in ends)
    assert trace_outline(np.zeros((3, 3), bool)) == ([], [])


def test_overlay_lies_on_the_image_and_tells_the_iou(image):
    mask = np.zeros((3, 4), bool)
    mask[1, 1:3] = True
    truth = upsample(mask, (6, 8))
    truth[2, 2] = False
    figure = plots.cluster_overlay(image, mask, truth=truth, title="block 3", opacity=0.3)
    shown, tokens, border, *_ = figure.data
    assert shown.source.startswith("data:image/png;base64,")
    assert (shown.dx, shown.dy) == (1, 1)
    assert (tokens.x0, tokens.dx, tokens.y0, tokens.dy) == (1, 2, 1, 2)
    assert np.isfinite(tokens.z).tolist() == mask.tolist()
    assert tokens.opacity == 0.3
    assert {value for value in border.x if value is not None} <= {2, 6}
    assert f"IoU {7 / 8:.2f}" in figure.layout.title.subtitle.text
    assert figure.layout.yaxis.scaleanchor == "x"
    assert figure.layout.yaxis.range == (6, 0)
    assert not figure.layout.xaxis.visible


def test_overlay_without_truth_draws_none(image):
    figure = plots.cluster_overlay(image, torch.ones(3, 4, dtype=torch.bool))
    assert not named(figure, "true subject")
    assert "IoU" not in figure.layout.title.subtitle.text


def test_overlay_refuses_what_is_no_mask(image):
    with pytest.raises(OpError, match="mask must be bool"):
        plots.cluster_overlay(image, np.ones((3, 4)))
    with pytest.raises(OpError, match=r"image 6 x 8 pixels. Give the truth"):
        plots.cluster_overlay(image, np.ones((3, 4), bool), truth=np.ones((3, 4), bool))


def test_overlay_grid_has_a_cell_per_mask(image):
    masks = {f"blocks.{i}.img": np.eye(4, dtype=bool) for i in range(10)} | {"final.img": np.ones((4, 4), bool)}
    figure = plots.overlay_grid(image, masks, truth=np.ones((6, 8), bool))
    labels = [label.text for label in figure.layout.annotations]
    assert labels[0].startswith("block 0<br>IoU 0.25")
    assert labels[-1] == "final.img<br>IoU 1.00"
    assert len([trace for trace in figure.data if isinstance(trace, go.Image)]) == 11
    assert not any(trace.showlegend for trace in figure.data if isinstance(trace, go.Scatter))
    with pytest.raises(OpError, match="no masks"):
        plots.overlay_grid(image, {})


@pytest.mark.parametrize(("n", "rows"), [(1, 1), (8, 1), (9, 2), (17, 3)])
def test_strip_wraps_and_keeps_pixels_sharp(image, n, rows):
    figure = plots.strip([image] * n, [f"strength {i}" for i in range(n)], title="Transport")
    assert len({trace.yaxis for trace in figure.data}) == n
    assert len({figure.layout[trace.yaxis.replace("y", "yaxis")].domain for trace in figure.data}) == rows
    assert all(trace.zsmooth is False for trace in figure.data)
    assert len(figure.layout.annotations) == n


def test_strip_makes_large_images_smaller_but_not_wider():
    figure = plots.strip([Image.new("RGB", (2048, 1024))], ["big"])
    assert figure.data[0].dx == figure.data[0].dy == 4
    assert figure.layout.xaxis.range == (0, 2048)


def test_strip_wants_a_label_per_image(image):
    with pytest.raises(OpError, match="2 images and 1 labels"):
        plots.strip([image] * 2, ["one"])


# Studies.


def disruption(ks, *, n=8, fidelity=True, intervals=True):
    lines = [{"k": 0, "arm": "no-op", "n": n, "rmse": 0.0, "fidelity": 0.95, "energy_share": np.nan}]
    lines += [
        {"k": k, "arm": arm, "n": 3 * n if arm == "random" else n, "rmse": 10.0 * k / (i + 1), "fidelity": 0.5}
        | {"energy_share": 0.7 / (i + 1)}
        for k in ks
        for i, arm in enumerate(ARMS_OF_STUDIES)
    ]
    table = pd.DataFrame(lines)
    for measure in ("rmse", "fidelity"):
        table[f"{measure}_low"] = table[measure] * 0.75 if intervals else np.nan
        table[f"{measure}_high"] = table[measure] * 1.5 if intervals else np.nan
    return table if fidelity else table.drop(columns=[name for name in table if name.startswith("fidelity")])


def test_one_k_gives_bars_with_intervals_and_shares():
    figure = plots.disruption_figure(disruption([12]))
    bars = [trace for trace in figure.data if isinstance(trace, go.Bar)]
    assert [bar.name for bar in bars] == [ARMS[arm].name for arm in ARMS_OF_STUDIES] * 2
    assert bars[0].x.tolist() == [120]
    assert bars[0].error_x.array.tolist() == [60]
    assert bars[0].error_x.arrayminus.tolist() == [30]
    assert bars[0].marker.line.color == ARMS["top"].colour
    assert "70 %" in figure.layout.yaxis.ticktext[0]
    assert "n = 8 to 24 per point" in figure.layout.title.subtitle.text
    assert "CI: 95 %" in figure.layout.title.subtitle.text
    assert "0 to 255" in figure.layout.xaxis.title.text


def test_what_top_has_more_shows_on_hovering():
    table = disruption([12]).assign(rmse_top_minus=7.0, rmse_top_minus_low=6.0, rmse_top_minus_high=8.0)
    top, bottom, *_ = plots.disruption_figure(table).data
    assert "paired" not in top.hovertemplate
    assert "top (massive) has %{customdata[5]:.1f} more" in bottom.hovertemplate
    assert bottom.customdata[0, 5:].tolist() == [7, 6, 8]


def test_several_k_give_lines_in_the_arms_colours():
    figure = plots.disruption_figure(disruption([8, 4, 12]))
    for arm in ARMS_OF_STUDIES:
        left, right = named(figure, ARMS[arm].name)
        assert left.line.color == left.error_y.color == ARMS[arm].colour
        assert left.customdata[:, 0].tolist() == [4, 8, 12]
        assert (left.showlegend, right.showlegend) == (True, False)
    assert figure.layout.xaxis.ticktext == ("4", "8", "12")
    assert named(figure, "no-op (nothing zeroed)")[1].y == (0.95, 0.95)


@pytest.mark.parametrize("ks", [[12], [4, 8]])
def test_a_single_sample_has_no_error_bars(ks):
    figure = plots.disruption_figure(disruption(ks, n=1, intervals=False))
    assert all(bars.array is None for trace in figure.data for bars in (trace.error_x, trace.error_y))


@pytest.mark.parametrize("ks", [[12], [4, 8]])
def test_without_a_judge_there_is_one_panel(ks):
    for table in (disruption(ks, fidelity=False), disruption(ks).assign(fidelity=None)):
        figure = plots.disruption_figure(table)
        assert {trace.xaxis for trace in figure.data} == {"x"}


def test_a_result_that_was_saved_and_loaded_draws_the_same():
    table = disruption([4, 8], intervals=False)
    loaded = table.astype(object).where(table.notna(), None)
    assert plots.disruption_figure(loaded).to_json() == plots.disruption_figure(table).to_json()


def organisation(*, shared=True, intervals=True):
    lines = [
        {"block": block, "arm": arm, "n": 8, "iou": 0.5 / (i + 1), "low": 0.4 / (i + 1), "high": 0.6 / (i + 1)}
        | {"chance": 0.2 if shared else 0.1 * (i + 1), "degenerate": float(arm == "bottom" and block == 2)}
        for block in (2, 0, 1)
        for i, arm in enumerate(ARMS_OF_STUDIES)
    ]
    table = pd.DataFrame(lines)
    return table if intervals else table.assign(low=np.nan, high=np.nan)


def test_organisation_has_a_line_a_band_and_a_chance_level():
    figure = plots.organisation_figure(organisation())
    (top,) = named(figure, "top (massive)")
    assert top.x.tolist() == [0, 1, 2]
    assert top.y.tolist() == [0.5] * 3
    (band,) = named(figure, "top (massive), 95 % CI")
    assert band.fill == "toself"
    assert set(band.y) == {0.4, 0.6, None}
    (chance,) = named(figure, "chance: random masks of equal size")
    assert chance.line.dash == "dot"
    assert figure.layout.yaxis.range == (0, 1)
    (bottom,) = named(figure, "bottom")
    assert list(bottom.marker.symbol) == ["square", "square", "square-open"]
    assert "hollow" in figure.layout.title.subtitle.text


def test_organisation_has_a_chance_level_per_arm_where_they_differ():
    figure = plots.organisation_figure(organisation(shared=False))
    assert named(figure, "bottom, chance")[0].line.color == ARMS["bottom"].colour
    assert named(figure, "bottom, chance")[0].y.tolist() == [0.2] * 3


def test_organisation_without_intervals_has_no_bands():
    assert not [trace for trace in plots.organisation_figure(organisation(intervals=False)).data if trace.fill]


def test_a_band_is_broken_where_an_interval_is_missing():
    table = organisation()
    table.loc[table["block"] == 1, ["low", "high"]] = np.nan
    band = named(plots.organisation_figure(table), "top (massive), 95 % CI")[0]
    assert list(band.x) == [0, 0, None, 2, 2, None]


def transfer(*, masked=(False, True), start=True, intervals=True):
    lines = [
        {"arm": arm, "masked": where, "strength": s, "n": 6, "to_source": 90 - 60 * s / (i + 1), "to_target": 50.0 * s}
        | {"fidelity_source": s, "fidelity_target": np.nan}
        for i, arm in enumerate((*ARMS_OF_STUDIES, "all"))
        for where in masked
        for s in (1.0, 0.5)
    ]
    untouched = {"arm": "untouched", "masked": False, "strength": 0.0, "n": 6, "to_source": 90.0, "to_target": 0.0}
    table = pd.DataFrame([*lines, untouched] if start else lines)
    for measure in ("to_source", "to_target"):
        table[f"{measure}_low"] = table[measure] - 5 if intervals else np.nan
        table[f"{measure}_high"] = table[measure] + 5 if intervals else np.nan
    return table


def test_transfer_shows_both_distances_and_the_way():
    figure = plots.transfer_figure(transfer())
    source, target, way = named(figure, "top (massive)")[:3]
    assert source.y.tolist() == [60, 30]
    assert target.y.tolist() == [25, 50]
    assert (way.x, way.y) == ((0, 25, 50), (90, 60, 30))
    assert way.text == ("", "0.5", "1")
    assert source.error_y.array.tolist() == [5, 5]
    solid, dashed = source.line.dash, named(figure, "top (massive)")[3].line.dash
    assert solid == "solid" != dashed
    assert {trace.name for trace in figure.data} >= {"subject's tokens only", "all tokens"}
    assert named(figure, "pixel-blend")[0].x == (0, 90)
    assert figure.layout.xaxis2.title.text == "RMSE to the target (0 to 255)"


def test_transfer_without_strength_zero_or_mask_says_so():
    figure = plots.transfer_figure(transfer(masked=(False,), start=False, intervals=False))
    assert not named(figure, "pixel-blend")
    assert not named(figure, "all tokens")
    assert "; all tokens" in figure.layout.title.subtitle.text
    assert all(trace.error_y.array is None and trace.line.dash == "solid" for trace in figure.data)
    assert named(figure, "all")[2].x == (25, 50)


def test_figures_are_figures_and_serialise():
    for figure in (
        plots.disruption_figure(disruption([4, 8])),
        plots.organisation_figure(organisation()),
        plots.transfer_figure(transfer()),
    ):
        assert type(figure) is go.Figure
        assert figure.layout.width is None
        assert figure.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"
        assert json.loads(figure.to_json())["data"]


@pytest.mark.parametrize(
    ("draw", "table"),
    [
        (plots.disruption_figure, disruption([4])),
        (plots.organisation_figure, organisation()),
        (plots.transfer_figure, transfer()),
    ],
)
def test_a_wrong_summary_is_named(draw, table):
    with pytest.raises(OpError, match=r"lacks arm; it has .*, n"):
        draw(table.drop(columns="arm"))
    with pytest.raises(OpError, match="no rows"):
        draw(table.iloc[:0])


def test_a_summary_without_edits_is_refused():
    table = disruption([])
    with pytest.raises(OpError, match="k > 0"):
        plots.disruption_figure(table)
    with pytest.raises(OpError, match="strength above 0"):
        plots.transfer_figure(transfer().query("strength == 0"))


def test_an_arm_has_the_same_name_in_figures_as_in_tables():
    assert all(look.name.split(" (")[0] == arm for arm, look in {**ARMS, **TRANSFER_ARMS}.items())
